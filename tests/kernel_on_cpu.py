"""Kernels' own headers as functions of tensors, compiled for lanes that take turns on the CPU
(tests/ops/warp)."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).parent / "ops"
CSRC = TESTS.parents[1] / "csrc"
# In the order of DType in csrc/common/dtype.h.
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)


class TensorArgument(ctypes.Structure):
    """``TensorArgument`` of tests/ops/warp/tensor_argument.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    )


def as_argument(tensor: Tensor | None) -> TensorArgument:
    if tensor is None:
        return TensorArgument()
    numbers = ctypes.c_int64 * tensor.dim()
    return TensorArgument(
        tensor.data_ptr(),
        DTYPES.index(tensor.dtype),
        tensor.dim(),
        numbers(*tensor.shape),
        numbers(*tensor.stride()),
    )


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """The library of tests/ops/<source>, compiled into a folder."""
    library = folder / f"{source}.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{TESTS / 'warp'}", f"-I{CSRC}"]
    # Shared memory is thread-local here, declared in kernels, and nothing has to set it up.
    options = ["-std=c++20", "-O1", "-fno-extern-tls-init", "-shared", "-fPIC"]
    command = [*compiler, *options, *includes, str(TESTS / source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
