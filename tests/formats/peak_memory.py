"""Run by test_memory.py in a process of its own: what loading and converting adds to the peak.

Prints a JSON object: step -> [bytes by which the process grew at most, bytes of the model].
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import effllm


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure(run: Callable[[], Any]) -> list[int]:
    """In a child, whose peak starts at what this process has now."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        before = peak_bytes()
        model = run()
        result = [peak_bytes() - before, model.effllm_report.bytes]
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.wait()
    assert text, "the child has failed"
    found: list[int] = json.loads(text)
    return found


def convert(source: Path, target: Path, format: Any) -> Any:
    """What the command does of it."""
    model = effllm.load(source, progress=False)
    effllm.save(model, target, format, progress=False)
    return model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Imports and first calls are not what is measured.
    for name, format in (("tiny-a", "compressed-tensors"), ("tiny.gguf", "gguf-q4_0")):
        convert(folder / "tiny", folder / name, format)
        effllm.load(folder / name, progress=False)
    source, gguf = folder / "source", folder / "b.gguf"
    steps: dict[str, Callable[[], Any]] = {
        "load": lambda: effllm.load(source, progress=False),
        "convert": lambda: convert(source, folder / "a", "compressed-tensors"),
        "convert to GGUF": lambda: convert(source, gguf, "gguf-q4_0"),
        "load GGUF": lambda: effllm.load(gguf, progress=False),
    }
    print(json.dumps({name: measure(run) for name, run in steps.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
