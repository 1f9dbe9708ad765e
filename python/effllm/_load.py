"""Loads the op libraries, once, and knows why one of them is missing.

`libeffllm_cpu.so` holds every schema and the CPU implementations; without it the import fails.
`libeffllm_cuda.so` is optional: when it cannot be loaded, CUDA calls raise the reason.
Nothing here initialises CUDA, so a process that imported effllm may still fork.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

LIB_DIR = Path(__file__).resolve().parent / "lib"
BUILD_HINT = "build it with `make build`, or `pip install --no-build-isolation -e .`"


@dataclass(frozen=True)
class Status:
    """What was built and what of it this process has loaded.

    `cuda_problem` is None when the CUDA library is loaded, else the reason why it is not.
    """

    version: str
    namespace: str
    torch_built: str
    cuda_built: str
    archs: tuple[str, ...]
    cpu_library: Path
    cuda_library: Path
    cuda_problem: str | None


def _read_build_info() -> dict[str, Any]:
    path = LIB_DIR / "build_info.json"
    if not path.exists() or not (LIB_DIR / "libeffllm_cpu.so").exists():
        raise ImportError(f"effllm: the op libraries are not in {LIB_DIR}: {BUILD_HINT}")
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def _load_cpu(path: Path, namespace: str, torch_built: str) -> None:
    """Load the schemas. A second copy would abort the interpreter in a static initialiser."""
    if str(path) in torch.ops.loaded_libraries:
        return
    registered = torch._C._dispatch_get_all_op_names()
    if any(name.startswith(f"{namespace}::") for name in registered):
        others = [lib for lib in torch.ops.loaded_libraries if Path(lib).name == path.name]
        raise ImportError(
            f"effllm: ops named '{namespace}::...' are already registered in this process, by "
            f"{', '.join(others) or 'another library'}, so {path} cannot be loaded. Import only "
            "one copy of effllm, or build one of them under another name: EFFLLM_NS=<name>"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"effllm: {path} does not load under torch {torch.__version__} (needs 2.11 or newer, "
            f"built against {torch_built}): {error}"
        ) from error


def _load_cuda(path: Path, cuda_built: str) -> str | None:
    """Load the CUDA implementations; the reason if that is not possible."""
    if str(path) in torch.ops.loaded_libraries:
        return None
    cuda_torch = torch.version.cuda
    if cuda_torch is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not cuda_built or not path.exists():
        return f"{path.name} was not built: put nvcc on PATH and run `make build EFFLLM_CUDA=on`"
    if cuda_built.split(".")[0] != cuda_torch.split(".")[0]:
        return (
            f"{path.name} was built with CUDA {cuda_built}, but this torch ({torch.__version__}) "
            f"uses CUDA {cuda_torch}: rebuild with nvcc {cuda_torch}, or install a torch for CUDA "
            f"{cuda_built}"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _refuse_cuda(namespace: str, reason: str) -> torch.library.Library:
    """Register CUDA kernels that raise `reason`, in place of torch's list of dispatch keys."""
    library = torch.library.Library(namespace, "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"{namespace}::"):

            def refuse(*args: object, _op: str = name, **kwargs: object) -> NoReturn:
                raise RuntimeError(f"{_op}: no CUDA implementation: {reason}")

            library.impl(name, refuse, "CUDA")
    return library


def gpu_problem(capability: tuple[int, int], archs: tuple[str, ...]) -> str | None:
    """Why a GPU of this compute capability cannot run a library built for `archs`, or None.

    Machine code runs on the same major capability and an equal or higher minor one; PTX, which is
    kept for the highest arch, on anything from there on.
    """
    built = sorted(divmod(int(arch), 10) for arch in archs)
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < (8, 0):
        return f"{name}: effllm needs compute capability 8.0 or newer"
    runs_code = any(major == capability[0] and minor <= capability[1] for major, minor in built)
    if runs_code or (built and built[-1] <= capability):
        return None
    arch = f"{capability[0]}{capability[1]}"
    return (
        f"{name}: the library is built for {', '.join(archs) or 'no GPU'}: "
        f'rebuild with EFFLLM_ARCHS="{";".join((arch, *archs))}"'
    )


def status() -> Status:
    """What is built and loaded; see `Status`."""
    return _status


_info = _read_build_info()
# torch.ops.loaded_libraries holds resolved paths.
_cpu_library = (LIB_DIR / "libeffllm_cpu.so").resolve()
_cuda_library = (LIB_DIR / "libeffllm_cuda.so").resolve()
_load_cpu(_cpu_library, _info["namespace"], _info["torch"])
_status = Status(
    version=_info["version"],
    namespace=_info["namespace"],
    torch_built=_info["torch"],
    cuda_built=_info["cuda"],
    archs=tuple(_info["archs"]),
    cpu_library=_cpu_library,
    cuda_library=_cuda_library,
    cuda_problem=_load_cuda(_cuda_library, _info["cuda"]),
)
if _status.cuda_problem and torch.version.cuda:
    # Kept: the registrations live as long as this object.
    _refusals = _refuse_cuda(_status.namespace, _status.cuda_problem)

ops = getattr(torch.ops, _status.namespace)
