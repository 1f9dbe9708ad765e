"""`effllm env`: versions, what is built, the GPUs, and why something is unavailable."""

import argparse
import platform
from importlib import metadata, util

import torch

from effllm import _load

OPTIONAL = (
    "transformers",
    "tokenizers",
    "accelerate",
    "gguf",
    "compressed-tensors",
    "matplotlib",
    "peft",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`env` takes no arguments."""


def describe_gpus(archs: tuple[str, ...]) -> list[tuple[str, str]]:
    """A row for each visible GPU, with what is wrong with it, or one row that says why none is."""
    if torch.version.cuda is None:
        return [("GPU", "none: this torch is built without CUDA")]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return [("GPU", f"none: {str(error).splitlines()[0]}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        problem = _load.gpu_problem((gpu.major, gpu.minor), archs)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        rows.append((f"GPU {index}", f"{text}: {problem or 'supported'}"))
    return rows


def describe_host() -> str:
    """Where the pybind11 module is; it is built for one Python version."""
    spec = util.find_spec("effllm._host")
    if spec is None:
        return f"missing for Python {platform.python_version()}: {_load.BUILD_HINT}"
    return str(spec.origin)


def describe_package(name: str) -> str:
    """The version of an optional package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"not installed (pip install {name})"


def report() -> list[tuple[str, str]]:
    """(name, value) rows, in printing order."""
    status = _load.status()
    cuda_library = f"not loaded: {status.cuda_problem}"
    if status.cuda_problem is None:
        cuda_library = str(status.cuda_library)
    built = f"torch {status.torch_built}, CUDA {status.cuda_built or 'no'}"
    return [
        ("effllm", f"{status.version}, torch.ops.{status.namespace}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}"),
        ("built with", built),
        ("archs built", ", ".join(status.archs) or "none"),
        ("CPU library", str(status.cpu_library)),
        ("CUDA library", cuda_library),
        ("_host module", describe_host()),
        *describe_gpus(status.archs),
        *((name, describe_package(name)) for name in OPTIONAL),
    ]


def run(args: argparse.Namespace) -> int:
    """Print the report, one row a line."""
    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0
