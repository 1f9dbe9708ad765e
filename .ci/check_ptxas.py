"""Checks what ptxas said about each kernel: `check_ptxas.py BUILD_FOLDER` (build/cmake/csrc).

Reads the log that the build leaves beside each CUDA object, prints seconds per file, registers and
spills per kernel, and the size of each library. Fails on
  - the notes C7510 to C7518: ptxas serialised wgmma instructions, which costs most of the speed;
  - spills in a kernel listed in spill_free.txt;
  - a file that took more than 90 s to compile.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS = 90.0

SERIALISED = re.compile(r"C751[0-8]")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    spill_bytes: int


def demangle(names: list[str]) -> list[str]:
    """Readable names, without return type and parameters."""
    run = subprocess.run(["c++filt", *names], text=True, capture_output=True, check=True)
    return [re.sub(r"^void ", "", line).rsplit("(", 1)[0] for line in run.stdout.splitlines()]


def read_kernels(text: str) -> list[Kernel]:
    """The kernels of one log."""
    found = list(KERNEL.finditer(text))
    names = demangle([match["name"] for match in found]) if found else []
    return [
        Kernel(name, log["arch"], int(log["registers"]), int(log["stores"]) + int(log["loads"]))
        for name, log in zip(names, found, strict=True)
    ]


def read_seconds(text: str) -> float:
    match = re.search(r"^seconds: ([\d.]+)$", text, re.MULTILINE)
    if match is None:
        raise ValueError("the log has no line 'seconds: ...'")
    return float(match[1])


def find_problems(source: str, text: str, spill_free: list[str]) -> list[str]:
    """What must not be in the log of `source`."""
    problems = [f"{source}: {line}" for line in text.splitlines() if SERIALISED.search(line)]
    if (seconds := read_seconds(text)) > MAX_SECONDS:
        problems.append(f"{source}: {seconds:.0f} s to compile, the limit is {MAX_SECONDS:.0f} s")
    for kernel in read_kernels(text):
        if kernel.spill_bytes and any(re.search(name, kernel.name) for name in spill_free):
            problems.append(
                f"{source}: {kernel.name} ({kernel.arch}) spills {kernel.spill_bytes} bytes"
            )
    return problems


def main(build: Path) -> int:
    lines = (ROOT / ".ci" / "spill_free.txt").read_text().splitlines()
    spill_free = [line for line in lines if line and not line.startswith("#")]
    # A log outlives its source: only those that still have one count.
    logs = {
        str(log.relative_to(build)).removesuffix(".o.log"): log.read_text()
        for log in sorted(build.rglob("*.cu.o.log"))
    }
    logs = {name: text for name, text in logs.items() if (ROOT / "csrc" / name).exists()}
    if not logs:
        print(f"no logs of CUDA objects under {build}: build with EFFLLM_CUDA=on")
        return 1

    problems: list[str] = []
    for source, text in logs.items():
        print(f"{source}: {read_seconds(text):.1f} s")
        for kernel in read_kernels(text):
            spills = f", spills {kernel.spill_bytes} bytes" if kernel.spill_bytes else ""
            print(f"  {kernel.arch:<7} {kernel.registers:3} registers  {kernel.name}{spills}")
        problems += find_problems(source, text, spill_free)
    for library in sorted((ROOT / "python" / "effllm").rglob("*.so")):
        print(f"{library.name}: {library.stat().st_size / 1e6:.2f} MB")

    names = [kernel.name for text in logs.values() for kernel in read_kernels(text)]
    problems += [
        f"spill_free.txt: no kernel is named {pattern}"
        for pattern in spill_free
        if not any(re.search(pattern, name) for name in names)
    ]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
