"""`python -m effllm`: the command line."""

import sys

from effllm.cli import main

sys.exit(main())
