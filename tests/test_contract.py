"""What every registered op owes. The ops are found by their registration: there is no list.

Adding an op without one of its parts, or with a fake kernel, backward or docstring that does not
hold, fails here. `csrc/README.md` states the same demands in prose.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from effllm import _load
from effllm.testing.case import Args, Case, Kwargs
from effllm.testing.compare import assert_equal
from effllm.testing.run import as_tuple, bind, check_values, results_of, tensors_of

REPO = Path(__file__).resolve().parents[1]
NAMESPACE = _load.status().namespace
OPS = sorted(
    {
        name.removeprefix(f"{NAMESPACE}::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{NAMESPACE}::")
    }
)
# opcheck and compilation trace the op anew for each case; values are checked for all of them.
NUM_TRACED = 4
SECTIONS = ("Args", "Returns", "Raises", "Source")
SHAPE = re.compile(r"\[[^\]]*\]")
DTYPE = re.compile(r"\b(u?int\d+|fp\d+|bf16|bfloat16|float\d*|bool|e4m3|e5m2|dtype of \w+)\b")


def op_module(op: str) -> Any:
    return importlib.import_module(f"effllm.ops.{op}")


def public_function(op: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(op_module(op), op)
    return function


def overload(op: str) -> Any:
    return getattr(_load.ops, op).default


def cases_of(op: str, kind: str = "CASES") -> list[Case]:
    """Empty if the module is missing: ``test_parts`` reports that."""
    if not (REPO / f"python/effllm/testing/cases/{op}.py").exists():
        return []
    return list(getattr(importlib.import_module(f"effllm.testing.cases.{op}"), kind))


def spread(items: list[Case], count: int) -> list[Case]:
    """At most ``count`` of the items, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def with_cases(count: int | None = None, *, functional: bool = False) -> Any:
    """Parametrise over the cases of every op, or over a spread of ``count`` of them."""
    return pytest.mark.parametrize(
        ("op", "case"),
        [
            pytest.param(op, case, id=f"{op}-{case.id}")
            for op in OPS
            if not (functional and overload(op)._schema.is_mutable)
            for case in (spread(cases_of(op), count) if count else cases_of(op))
        ],
    )


every_op = pytest.mark.parametrize("op", OPS)


def docstring_sections(text: str) -> dict[str, str]:
    """The sections of a docstring by title: everything indented below ``Title:``."""
    sections: dict[str, str] = {}
    title = None
    for line in inspect.cleandoc(text).splitlines():
        match = re.match(rf"({'|'.join(SECTIONS)}):(.*)$", line)
        if match:
            title = match[1]
            sections[title] = match[2].strip()
        elif title and (not line or line.startswith(" ")):
            sections[title] += "\n" + line
        else:
            title = None
    return sections


def argument_entries(section: str) -> dict[str, str]:
    """``x: text`` and ``k, v: text`` entries of an Args section, by name."""
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = re.match(r" {4}(\w+(?:, \w+)*)(?: \([^)]*\))?:", line)
        if match:
            names = match[1].split(", ")
        for name in names:
            entries[name] = entries.get(name, "") + line + "\n"
    return entries


def docstring_faults(function: Callable[..., Any], schema: Any) -> list[str]:
    sections = docstring_sections(function.__doc__ or "")
    needed = [title for title in SECTIONS if title != "Returns" or schema.returns]
    faults = [f"section '{title}:' is missing" for title in needed if not sections.get(title)]
    entries = argument_entries(sections.get("Args", ""))
    for argument in schema.arguments:
        entry = entries.get(argument.name)
        if entry is None:
            faults.append(f"Args has no entry '{argument.name}:'")
        elif "Tensor" in str(argument.type):
            if not SHAPE.search(entry):
                faults.append(f"{argument.name}: no [shape]")
            if not DTYPE.search(entry):
                faults.append(f"{argument.name}: no dtype (as uint8, int32, fp16, bf16)")
    if schema.returns:
        returns = sections.get("Returns", "")
        if len(SHAPE.findall(returns)) < len(schema.returns) or not DTYPE.search(returns):
            faults.append("Returns: each result needs its [shape] and dtype")
    if "Error" not in sections.get("Raises", ""):
        faults.append("Raises names no exception")
    paths = re.findall(r"csrc/[\w/.]+\w", sections.get("Source", ""))
    if not paths or not all((REPO / path).exists() for path in paths):
        faults.append(f"Source names no existing file of csrc, got {paths}")
    return faults


def signature_faults(function: Callable[..., Any], schema: Any) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())
    found = [parameter.name for parameter in parameters]
    needed = [argument.name for argument in schema.arguments]
    if found != needed:
        return [f"parameters must be those of the schema, {needed}, got {found}"]
    faults = []
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        if (parameter.kind is parameter.KEYWORD_ONLY) != argument.kwarg_only:
            faults.append(f"{parameter.name}: keyword-only must be {argument.kwarg_only}")
        has_default = parameter.default is not parameter.empty
        if has_default != argument.has_default_value() or (
            has_default and parameter.default != argument.default_value
        ):
            faults.append(f"{parameter.name}: default must be the schema's")
        if parameter.annotation is parameter.empty:
            faults.append(f"{parameter.name}: no type hint")
    return faults


def significant_strides(tensor: Tensor) -> list[int | None]:
    """Strides that lead anywhere: none in an empty tensor, none along a dimension of size 1."""
    return [
        stride if size > 1 and tensor.numel() > 0 else None
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def layout_faults(fake: tuple[Any, ...], real: tuple[Any, ...]) -> list[str]:
    """Where fake results differ from real ones: opcheck skips strides on the CPU."""
    if len(fake) != len(real):
        return [f"{len(real)} results, the fake kernel gives {len(fake)}"]
    faults = []
    for index, (f, r) in enumerate(zip(fake, real, strict=True)):
        for what, got, needed in (
            ("shape", list(f.shape), list(r.shape)),
            ("strides", significant_strides(f), significant_strides(r)),
            ("dtype", f.dtype, r.dtype),
            ("device", f.device, r.device),
        ):
            if got != needed:
                faults.append(f"result {index}: {what} is {needed}, the fake kernel says {got}")
    return faults


def tracking(argument: Tensor | list[Tensor]) -> tuple[Tensor | list[Tensor], Tensor]:
    """The argument anew with gradients, of a list those of its last tensor; and that tensor."""
    if isinstance(argument, Tensor):
        tensor = argument.detach().clone().requires_grad_()
        return tensor, tensor
    *others, last = argument
    tensor = last.detach().clone().requires_grad_()
    return [*others, tensor], tensor


def gradient_of(op: Any, args: Args, kwargs: Kwargs, name: str) -> Tensor | str:
    """The gradient of a float argument, of a list its last tensor's, or the text that refuses it.

    Fails if there is neither: a training loop would silently not train the argument. torch itself
    only warns then.
    """
    bound = bind(op._schema, args, kwargs)
    bound[name], tracked_input = tracking(bound[name])
    try:
        results = [r for r in as_tuple(op(**bound)) if isinstance(r, Tensor)]
        tracked = [r.double().sum() for r in results if r.requires_grad]
        assert tracked, f"{op.name()}: no result depends on {name} as far as autograd knows"
        total = sum(tracked[1:], tracked[0])
        (gradient,) = torch.autograd.grad(total, tracked_input, allow_unused=True)
    except RuntimeError as error:
        return str(error)
    assert gradient is not None, f"{op.name()}: the gradient of {name} is lost without an error"
    assert gradient.shape == tracked_input.shape
    return gradient


def is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def opcheck(op: Any, args: Args, kwargs: Kwargs) -> None:
    """``torch.library.opcheck``. Its test_schema compares arguments before and after the call as
    numbers, which torch cannot with 8-bit floats: of ops that take them ours compares bytes. What
    mutating ops do to them is what ``test_values`` is about."""
    inputs = tensors_of((args, kwargs))
    if not any(is_float8(tensor) for tensor in inputs):
        torch.library.opcheck(op, args, kwargs)
        return
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, kwargs, test_utils=others)
    if op._schema.is_mutable:
        return
    before = [tensor.detach().contiguous().view(torch.uint8).clone() for tensor in inputs]
    results = tensors_of(op(*args, **kwargs))
    for tensor, bits in zip(inputs, before, strict=True):
        assert_equal(tensor.detach().contiguous().view(torch.uint8), bits, name="argument")
        for result in results:
            shared = result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            assert result.numel() == 0 or not shared, f"{op.name()} returns an argument's memory"


def float_tensors(schema: Any, args: Args, kwargs: Kwargs) -> list[str]:
    bound = bind(schema, args, kwargs)
    return [
        name
        for name, value in bound.items()
        if any(tensor.is_floating_point() and tensor.numel() > 0 for tensor in tensors_of(value))
    ]


def test_ops_are_registered() -> None:
    assert OPS, f"no op is registered in the namespace {NAMESPACE}: nothing would be checked below"


@every_op
def test_parts(op: str) -> None:
    files = (
        f"python/effllm/ops/{op}.py",
        f"python/effllm/testing/cases/{op}.py",
        f"tests/ops/test_{op}.py",
        f"bench/bench_{op}.py",
    )
    missing = [file for file in files if not (REPO / file).exists()]
    assert not missing, f"{op}: {', '.join(missing)} missing"
    assert callable(public_function(op))
    assert callable(getattr(op_module(op), f"{op}_ref", None)), f"{op}: no {op}_ref in its module"
    for kind in ("CASES", "BENCH"):
        cases = cases_of(op, kind)
        assert cases, f"{op}: {kind} is empty"
        assert all(isinstance(case, Case) and case.op == op for case in cases)
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids), f"{op}: {kind} has two cases of one id"


@every_op
def test_docstring(op: str) -> None:
    assert docstring_faults(public_function(op), overload(op)._schema) == []


@every_op
def test_signature(op: str) -> None:
    assert signature_faults(public_function(op), overload(op)._schema) == []


@pytest.mark.sanitizer
@with_cases()
def test_values(op: str, case: Case, device: str) -> None:
    check_values(public_function(op), case, device)


@with_cases()
def test_fake_kernel(op: str, case: Case, device: str) -> None:
    args, kwargs = case.make(device)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = torch.utils._pytree.tree_map_only(
            Tensor, mode.from_tensor, (args, kwargs)
        )
        fake = as_tuple(overload(op)(*fake_args, **fake_kwargs))
    real = as_tuple(overload(op)(*args, **kwargs))
    assert layout_faults(fake, real) == []


@with_cases(NUM_TRACED)
def test_opcheck(op: str, case: Case, device: str) -> None:
    args, kwargs = case.make(device)
    opcheck(overload(op), args, kwargs)


@with_cases(NUM_TRACED)
def test_compiles_without_graph_breaks(op: str, case: Case, device: str) -> None:
    schema = overload(op)._schema
    expected = results_of(public_function(op), schema, *case.make(device))
    torch._dynamo.reset()
    compiled = torch.compile(public_function(op), fullgraph=True, backend="aot_eager")
    results = results_of(compiled, schema, *case.make(device))
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_equal(result, wanted, name=f"result {index}")


@with_cases(NUM_TRACED, functional=True)
def test_gradients_come_or_are_refused(op: str, case: Case, device: str) -> None:
    args, kwargs = case.make(device)
    schema = overload(op)._schema
    if not any(r.is_floating_point() for r in tensors_of(overload(op)(*args, **kwargs))):
        return  # integers have no gradient: there is none to lose, and torch refuses to ask for one
    for name in float_tensors(schema, args, kwargs):
        gradient = gradient_of(overload(op), args, kwargs, name)
        if isinstance(gradient, str):
            assert f"{NAMESPACE}::{op}" in gradient, f"{name}: the refusal does not name the op"
            continue
        # The backward has to hold under tracing too, so opcheck sees the argument that has one.
        bound = bind(schema, args, kwargs)
        bound[name], _ = tracking(bound[name])
        opcheck(overload(op), (), bound)


# The checks above can fail: a faulty op for each of them.


@pytest.fixture
def faulty() -> Iterator[Any]:
    """An op without an autograd formula, in a namespace of its own."""
    library = torch.library.Library("effllm_contract_test", "FRAGMENT")
    library.define("scale(Tensor x, *, float factor=1.) -> Tensor")
    library.impl("scale", lambda x, *, factor=1.0: (x * factor).detach(), "CPU")
    yield torch.ops.effllm_contract_test.scale.default
    library._destroy()


@pytest.mark.filterwarnings("ignore:effllm_contract_test")
def test_a_lost_gradient_is_found(faulty: Any) -> None:
    with pytest.raises(AssertionError, match="scale: the gradient of x is lost without an error"):
        gradient_of(faulty, (torch.ones(3),), {}, "x")


def test_docstring_gaps_are_found(faulty: Any) -> None:
    def scale(x: Tensor, *, factor: float = 1.0) -> Tensor:
        """Scale.

        Args:
            x: a tensor.

        Returns: bf16.

        Source: csrc/no/such.h
        """
        return x * factor

    assert docstring_faults(scale, faulty._schema) == [
        "section 'Raises:' is missing",
        "x: no [shape]",
        "x: no dtype (as uint8, int32, fp16, bf16)",
        "Args has no entry 'factor:'",
        "Returns: each result needs its [shape] and dtype",
        "Raises names no exception",
        "Source names no existing file of csrc, got ['csrc/no/such.h']",
    ]


def test_signature_differences_are_found(faulty: Any) -> None:
    def renamed(y: Tensor, *, factor: float = 1.0) -> None: ...

    def loosened(x: Tensor, factor: float = 2.0) -> None: ...

    assert "parameters must be those of the schema" in signature_faults(renamed, faulty._schema)[0]
    assert signature_faults(loosened, faulty._schema) == [
        "factor: keyword-only must be True",
        "factor: default must be the schema's",
    ]


def test_layout_differences_are_found() -> None:
    real, fake = torch.empty(4, 3).t(), torch.empty(3, 4, dtype=torch.int32)
    assert layout_faults((fake,), (real,)) == [
        "result 0: strides is [1, 3], the fake kernel says [4, 1]",
        "result 0: dtype is torch.float32, the fake kernel says torch.int32",
    ]
    assert layout_faults((torch.empty(0, 3),), (torch.empty(3, 0).t(),)) == []
