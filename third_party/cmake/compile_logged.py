"""Run a compiler, keep what it says and its seconds in a log: `compile_logged.py LOG COMMAND...`.

`-Xptxas -v` prints lines about every kernel even when all is well: they belong in the log, not on
the screen. Warnings and the output of a failed run are shown.
"""

import resource
import subprocess
import sys
from pathlib import Path


def main(log: Path, command: list[str]) -> int:
    run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # Processor time: the clock on the wall also counts what else the machine does.
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    log.write_text(f"{run.stdout}seconds: {usage.ru_utime + usage.ru_stime:.1f}\n")
    if run.returncode:
        sys.stderr.write(run.stdout)
    elif "warning" in run.stdout:
        about_kernels = ("ptxas info", "    ")
        lines = run.stdout.splitlines(keepends=True)
        sys.stderr.writelines(line for line in lines if not line.startswith(about_kernels))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
