"""`python -m effllm`: the command line."""

import os
import sys

from effllm.cli import main

try:
    status = main()
    sys.stdout.flush()
except BrokenPipeError:
    # Whoever read the output has seen enough (`| head`). What is still buffered goes nowhere, or
    # the interpreter would complain of it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
sys.exit(status)
