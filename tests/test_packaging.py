"""The build, what it leaves in the package, and what an import says when something is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import effllm
from effllm import _load
from effllm.cli import main

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], text=True, capture_output=True, timeout=300
    )


def load_script(path: str) -> ModuleType:
    """A script that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


# -- what is installed --------------------------------------------------------------------------


def test_status_agrees_with_the_sources() -> None:
    status = _load.status()
    assert status.version == PYPROJECT["project"]["version"] == effllm.__version__
    assert status.cpu_library.is_file()
    assert hasattr(_load.ops, "int4_pack")
    assert (Path(effllm.__file__).parent / "py.typed").is_file()


def test_wheel_holds_libraries_and_data(tmp_path: Path) -> None:
    if not (ROOT / "build" / "cmake" / "build.ninja").exists():
        pytest.skip("the libraries were not built in this folder")
    # The options of the present build, or the libraries under test would be replaced.
    status = _load.status()
    cuda = "on" if status.cuda_built else "off"
    options = {
        "EFFLLM_CUDA": cuda,
        "EFFLLM_ARCHS": ";".join(status.archs) or "80;90",
        "EFFLLM_NS": status.namespace,
    }
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(ROOT)], check=True, env={**os.environ, **options}
    )
    (wheel,) = tmp_path.glob("effllm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = ["lib/libeffllm_cpu.so", "lib/build_info.json", "py.typed", "_host.pyi"]
    wanted += ["lib/libeffllm_cuda.so"] if cuda == "on" else []
    wanted += [
        str(path.relative_to(ROOT / "python" / "effllm"))
        for path in (ROOT / "python" / "effllm" / "demo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [name for name in wanted if f"effllm/{name}" not in names] == []
    assert len([name for name in names if re.match(r"effllm/_host\..*\.so$", name)]) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ ]", requirement)[0] for requirement in requirements}


def test_every_dependency_is_explained_and_pinned() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    installed = requirement_names(
        PYPROJECT["build-system"]["requires"]
        + PYPROJECT["project"]["dependencies"]
        + [name for extra in ("hf", "formats", "plot", "dev") for name in extras[extra]]
    )
    pins = (ROOT / ".ci" / "constraints.txt").read_text()
    assert [name for name in installed if f"\n{name}==" not in pins] == []

    readme = (ROOT / "third_party" / "README.md").read_text()
    named = installed | requirement_names([name for extra in extras.values() for name in extra])
    assert [name for name in sorted(named) if name not in readme] == []


# -- importing ----------------------------------------------------------------------------------


def test_import_needs_no_extra_and_leaves_cuda_alone() -> None:
    code = (
        "import sys, effllm, torch; assert not torch.cuda.is_initialized();"
        "extras = {'transformers', 'tokenizers', 'accelerate', 'matplotlib', 'typer', 'peft'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"


LOAD_COPY = """
import importlib.util, sys
import effllm._load
spec = importlib.util.spec_from_file_location("copy_of_load", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def test_second_copy_is_an_import_error(tmp_path: Path) -> None:
    shutil.copy(_load.__file__, tmp_path)
    shutil.copytree(_load.LIB_DIR, tmp_path / "lib")
    run = run_python(LOAD_COPY, str(tmp_path / "_load.py"))
    assert run.returncode == 1  # an abort would be negative
    message = run.stderr.splitlines()[-1]
    assert message.startswith("ImportError: effllm: ops named 'effllm::...' are already registered")
    assert str(_load.status().cpu_library) in message
    assert "EFFLLM_NS=" in message


def test_reload_is_harmless() -> None:
    run = run_python("import importlib, effllm._load as load; importlib.reload(load).ops.int4_pack")
    assert run.returncode == 0, run.stderr


def test_missing_library_says_how_to_build(tmp_path: Path) -> None:
    shutil.copy(_load.__file__, tmp_path)
    run = run_python(LOAD_COPY, str(tmp_path / "_load.py"))
    assert run.returncode == 1
    message = run.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: effllm: the op libraries are not in {tmp_path}/lib")
    assert "make build" in message


def test_broken_library_is_an_import_error(tmp_path: Path) -> None:
    library = tmp_path / "libeffllm_cpu.so"
    library.write_text("no library")
    with pytest.raises(ImportError, match=r"does not load under torch .* built against 2\.13\.0"):
        _load._load_cpu(library, "effllm_unused", "2.13.0")


@pytest.mark.parametrize(
    ("torch_cuda", "built", "exists", "reason"),
    [
        (None, "13.0", True, r"this torch \(.*\) is built without CUDA"),
        ("13.0", "", False, r"was not built: put nvcc on PATH and run `make build EFFLLM_CUDA=on`"),
        ("13.0", "13.0", False, r"was not built"),
        ("12.8", "13.0", True, r"built with CUDA 13.0, but this torch \(.*\) uses CUDA 12.8"),
        ("13.2", "13.0", True, r"does not load: .*"),  # the right major, but not a library
    ],
)
def test_cuda_library_is_refused_with_a_reason(
    torch_cuda: str | None,
    built: str,
    exists: bool,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    library = tmp_path / "libeffllm_cuda.so"
    if exists:
        library.write_text("no library")
    assert re.search(reason, _load._load_cuda(library, built) or "")


def test_cuda_calls_raise_the_reason() -> None:
    namespace = "effllm_packaging_test"
    schema = torch.library.Library(namespace, "DEF")
    schema.define("probe(Tensor x) -> Tensor")
    refusals = _load._refuse_cuda(namespace, "because of a test")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        RuntimeError, match=f"^{namespace}::probe: no CUDA implementation: because of a test$"
    ):
        torch.ops.effllm_packaging_test.probe.default.redispatch(cuda, torch.zeros(1))
    refusals._destroy()
    schema._destroy()


@pytest.mark.parametrize(
    ("capability", "archs", "problem"),
    [
        ((8, 0), ("80", "90"), None),
        ((8, 9), ("80", "90"), None),  # machine code of 8.0
        ((9, 0), ("80", "90"), None),
        ((9, 0), ("80",), None),  # PTX of 8.0
        ((12, 0), ("80", "90"), None),  # PTX of 9.0
        ((7, 5), ("80", "90"), "sm_75: effllm needs compute capability 8.0 or newer"),
        ((8, 0), ("90",), 'rebuild with EFFLLM_ARCHS="80;90"'),
        ((8, 6), ("89",), "sm_86: the library is built for 89"),
        ((9, 0), (), "the library is built for no GPU"),
    ],
)
def test_gpu_problem(
    capability: tuple[int, int], archs: tuple[str, ...], problem: str | None
) -> None:
    found = _load.gpu_problem(capability, archs)
    assert (found is None) if problem is None else (problem in (found or ""))


@pytest.mark.gpu
def test_this_gpu_is_supported() -> None:
    assert _load.gpu_problem(torch.cuda.get_device_capability(), _load.status().archs) is None


# -- the command line ---------------------------------------------------------------------------


def test_env_names_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["torch"].startswith(torch.__version__)
    assert rows["CPU library"] == str(_load.status().cpu_library)
    assert "_host" in rows["_host module"]
    if torch.version.cuda is None:
        assert rows["GPU"] == "none: this torch is built without CUDA"
        assert "is built without CUDA" in rows["CUDA library"]


def test_env_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "effllm", "env"], text=True, capture_output=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("effllm ")


def test_a_reader_that_leaves_early_is_no_error_to_complain_of() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "effllm", "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        complaints = run.stderr.read()
    assert (run.returncode, complaints) == (1, b"")


def test_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


# -- the build's own scripts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PYTHON", "/nonexistent/python", "effllm: Python >= 3.11 is needed: install python3.11"),
        ("CXX", "/nonexistent/c++", "effllm: no C++20 compiler (/nonexistent/c++): install one"),
    ],
)
def test_setup_names_what_the_machine_lacks(variable: str, value: str, message: str) -> None:
    run = subprocess.run(
        ["bash", str(ROOT / ".ci" / "setup_venv.sh")],
        text=True,
        capture_output=True,
        env={**os.environ, variable: value},
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(message)


PTXAS_LOG = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Z4axpyIfLi4EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z4axpyIfLi4EEvPT_
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 42 registers, used 0 barriers, 360 bytes cmem[0]
seconds: 3.5
"""


def test_check_ptxas() -> None:
    check = load_script(".ci/check_ptxas.py")
    assert check.read_kernels(PTXAS_LOG) == [check.Kernel("axpy<float, 4>", "sm_80", 42, 20)]
    assert check.find_problems("a.cu", PTXAS_LOG, []) == []
    assert check.find_problems("a.cu", PTXAS_LOG, ["^axpy<"]) == [
        "a.cu: axpy<float, 4> (sm_80) spills 20 bytes"
    ]
    slow = PTXAS_LOG.replace("seconds: 3.5", "seconds: 90.5")
    assert check.find_problems("a.cu", slow, []) == ["a.cu: 90 s to compile, the limit is 90 s"]
    note = "ptxas info    : (C7510) Potential Performance Loss: wgmma serialized\n"
    assert check.find_problems("a.cu", note + PTXAS_LOG, []) == [f"a.cu: {note.strip()}"]
    with pytest.raises(ValueError, match="no line 'seconds"):
        check.read_seconds("")


def test_compile_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compile_logged = load_script("third_party/cmake/compile_logged.py")
    log = tmp_path / "log"

    def run(text: str, status: int) -> str:
        code = f"import sys; print({text!r}); sys.exit({status})"
        assert compile_logged.main(log, [sys.executable, "-c", code]) == status
        assert re.search(r"^seconds: \d+\.\d$", log.read_text(), re.MULTILINE)
        return capfd.readouterr().err

    assert run("ptxas info    : Used 8 registers", 0) == ""
    assert (
        run("ptxas info    : Used 8 registers\na.cu: warning #177-D", 0) == "a.cu: warning #177-D\n"
    )
    assert run("ptxas info    : x\nerror", 1) == "ptxas info    : x\nerror\n"


def test_build_info_is_json() -> None:
    info = json.loads((_load.LIB_DIR / "build_info.json").read_text())
    assert set(info) == {"version", "namespace", "torch", "cuda", "archs"}
