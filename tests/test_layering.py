"""The structure that keeps the sources readable, as rules a machine can check.

Each rule takes the root of a source tree and returns what breaks it, so that the tests at the end
can show on a small wrong tree that the rule bites. `csrc/README.md` states the rules in prose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MAX_LINES = 500
SOURCE_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
TEXT_SUFFIXES = SOURCE_SUFFIXES | {".py", ".pyi", ".sh", ".md"}

FAMILIES = ("gemm", "attention", "kvcache", "spec")
BASE = {
    "common": ("common",),
    "ptx": ("common", "ptx"),
    "cuda": ("common", "ptx", "cuda"),
    "quant": ("common", "ptx", "cuda", "quant"),
    "host": ("host",),
} | {family: ("common", "ptx", "cuda", family) for family in FAMILIES}
# What a family may take from quant: how weights are packed, and how they are unpacked in registers.
SHARED_QUANT = re.compile(r"quant/(\w*layout\.h|dequant\.cuh)$")


def sources(root: Path) -> Iterator[Path]:
    return (p for p in sorted((root / "csrc").rglob("*")) if p.suffix in SOURCE_SUFFIXES)


def code_of(path: Path) -> str:
    """The text with comments and string contents blanked, line numbers kept."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n") if match[0].startswith("/") else '""'

    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\""
    # Includes are code, and look like strings.
    lines = [
        line if line.lstrip().startswith("#include") else None
        for line in path.read_text().splitlines()
    ]
    blanked = re.sub(pattern, blank, path.read_text(), flags=re.DOTALL).split("\n")
    return "\n".join(
        line if line is not None else other
        for line, other in zip(lines + [None] * len(blanked), blanked, strict=False)
    )


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', code_of(path), flags=re.MULTILINE)


def found(root: Path, path: Path, match: re.Match[str], text: str) -> str:
    line = text.count("\n", 0, match.start()) + 1
    return f"{path.relative_to(root)}:{line}: {match[0].strip()}"


def is_op_file(root: Path, path: Path) -> bool:
    """<op>.cpp and <op>.cu: those whose stem is an op of the Python package."""
    return path.suffix in {".cpp", ".cu"} and (root / f"python/effllm/ops/{path.stem}.py").exists()


def torch_outside_ops(root: Path) -> list[str]:
    """torch is seen by <op>.cpp, <op>.cu and common/torch.h alone."""
    return [
        f"{path.relative_to(root)}: includes {name}"
        for path in sources(root)
        if not is_op_file(root, path) and path != root / "csrc/common/torch.h"
        for name in includes(path)
        if name.split("/")[0] in {"torch", "ATen", "c10"} or name == "common/torch.h"
    ]


def pybind_outside_module(root: Path) -> list[str]:
    """pybind11 and Python are seen by host/module.cpp alone."""
    return [
        f"{path.relative_to(root)}: includes {name}"
        for path in sources(root)
        if path != root / "csrc/host/module.cpp"
        for name in includes(path)
        if name.startswith("pybind11/") or name == "Python.h"
    ]


def wrong_include_direction(root: Path) -> list[str]:
    """ptx <- cuda <- quant <- families, common below all, host alone."""
    folders = {path.name for path in (root / "csrc").iterdir() if path.is_dir()}
    faults = [f"csrc/{folder}: not a known family" for folder in sorted(folders - BASE.keys())]
    for path in sources(root):
        folder = path.relative_to(root / "csrc").parts[0]
        for name in includes(path):
            target = folder if (path.parent / name).exists() else name.split("/")[0]
            if folder not in BASE or target not in folders or target in BASE[folder]:
                continue
            if folder in FAMILIES and SHARED_QUANT.fullmatch(name):
                continue
            faults.append(f"{path.relative_to(root)}: must not include {name}")
    return faults


def asm_outside_ptx(root: Path) -> list[str]:
    """One instruction, one wrapper, in ptx/."""
    return [
        found(root, path, match, text)
        for path in sources(root)
        if path.parent != root / "csrc/ptx"
        for text in [code_of(path)]
        for match in re.finditer(r"\b(__)?asm(__)?\b", text)
    ]


def process_exits(root: Path) -> list[str]:
    """A library never ends the process of whoever uses it."""
    return [
        found(root, path, match, text)
        for path in sources(root)
        for text in [code_of(path)]
        for match in re.finditer(r"\b(exit|_Exit|quick_exit|abort|terminate)\s*\(", text)
    ]


def using_namespace_in_headers(root: Path) -> list[str]:
    return [
        found(root, path, match, text)
        for path in sources(root)
        if path.suffix in {".h", ".cuh"}
        for text in [code_of(path)]
        for match in re.finditer(r"\busing\s+namespace\b", text)
    ]


def kernels_without_roofline(root: Path) -> list[str]:
    """A file with a kernel opens with a comment that says what bounds the kernel."""
    faults = []
    for path in sources(root):
        if "__global__" not in code_of(path):
            continue
        opening = path.read_text().split("namespace", 1)[0]
        comments = " ".join(re.findall(r"//([^\n]*)", opening)).lower()
        if not re.search(r"roof|bound|bandwidth", comments):
            faults.append(f"{path.relative_to(root)}: no roofline sentence at the top")
    return faults


def long_files(root: Path) -> list[str]:
    """500 lines are what a reader can hold; more is two files."""
    return [
        f"{path.relative_to(root)}: {lines} lines"
        for folder in ("csrc", "python", "tests", "bench")
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in TEXT_SUFFIXES and path.is_file()
        for lines in [len(path.read_text().splitlines())]
        if lines > MAX_LINES
    ]


RULES: tuple[Callable[[Path], list[str]], ...] = (
    torch_outside_ops,
    pybind_outside_module,
    wrong_include_direction,
    asm_outside_ptx,
    process_exits,
    using_namespace_in_headers,
    kernels_without_roofline,
    long_files,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[Path], list[str]]) -> None:
    assert rule(REPO) == []


def test_sources_are_found() -> None:
    assert len(list(sources(REPO))) > 10


BROKEN = [
    (torch_outside_ops, "csrc/gemm/a.h", "#include <torch/csrc/stable/tensor.h>\n"),
    (torch_outside_ops, "csrc/gemm/a_sm80.cuh", '#include "common/torch.h"\n'),
    (torch_outside_ops, "csrc/gemm/not_an_op.cpp", '#include "common/torch.h"\n'),
    (pybind_outside_module, "csrc/host/pool.cpp", "#include <pybind11/pybind11.h>\n"),
    (wrong_include_direction, "csrc/ptx/a.cuh", '#include "cuda/vec.cuh"\n'),
    (wrong_include_direction, "csrc/common/a.h", '#include "quant/int4_layout.h"\n'),
    (wrong_include_direction, "csrc/attention/a.h", '#include "gemm/a.h"\n'),
    (wrong_include_direction, "csrc/gemm/a.h", '#include "quant/int4_pack.h"\n'),
    (wrong_include_direction, "csrc/host/a.h", '#include "common/view.h"\n'),
    (wrong_include_direction, "csrc/misc/a.h", "\n"),
    (asm_outside_ptx, "csrc/gemm/a.cuh", '// reasons\nasm volatile("nop;");\n'),
    (process_exits, "csrc/gemm/a.cpp", "void f() { std::abort(); }\n"),
    (using_namespace_in_headers, "csrc/gemm/a.h", "using namespace std;\n"),
    (kernels_without_roofline, "csrc/gemm/a.cu", "// fast\n__global__ void a() {}\n"),
    (long_files, "tests/a.py", "x = 1\n" * 501),
]


def small_tree(root: Path) -> Path:
    """A tree in which every rule holds, in the places where it might be taken to be broken."""
    for path, text in {
        "python/effllm/ops/a.py": "",
        "csrc/common/torch.h": "#include <torch/csrc/stable/tensor.h>\n",
        "csrc/common/view.h": "",
        "csrc/cuda/vec.cuh": '#include "ptx/cvt.cuh"\n',
        "csrc/ptx/cvt.cuh": 'asm volatile("nop;");\n',
        "csrc/quant/int4_layout.h": "",
        "csrc/quant/int4_pack.h": "",
        "csrc/host/module.cpp": "#include <pybind11/pybind11.h>\n",
        "csrc/attention/b.h": "",
        "csrc/gemm/a.h": '#include "quant/int4_layout.h"\n// no asm, no exit() here\n',
        "csrc/gemm/a.cpp": '#include "common/torch.h"\nauto t = "abort()";  // using namespace\n',
        "csrc/gemm/a.cu": "// Bound by bytes: roofline.\n__global__ void a() {}\n",
        "bench/a.py": "x = 1\n" * 500,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_right_tree(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(small_tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("rule", "path", "text"), BROKEN, ids=[f"{rule.__name__}-{path}" for rule, path, _ in BROKEN]
)
def test_rule_bites(
    rule: Callable[[Path], list[str]], path: str, text: str, tmp_path: Path
) -> None:
    root = small_tree(tmp_path)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    assert len(rule(root)) == 1
