"""What the quantised layers have in common: inputs, casts, and their state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from effllm.nn import (
    Fp8Linear,
    GgufLinear,
    Int4Linear,
    Int8Linear,
    Lut4Linear,
    W4A8Linear,
    W8A8Linear,
)
from effllm.nn.gguf_linear import LAYOUTS, BlockType
from effllm.nn.packed_linear import PackedLinear
from effllm.nn.quantized_linear import QuantizedLinear

K, N, GROUP_SIZE = 100, 70, 32


@dataclass(frozen=True)
class Kind:
    """``empty(**options)`` has the layout of what ``make(dtype)`` gives."""

    name: str
    layer: type[QuantizedLinear]
    options: dict[str, object]
    convert: Callable[[nn.Linear], QuantizedLinear]
    k: int = K

    def empty(self) -> QuantizedLinear:
        return self.layer(self.k, N, **self.options)

    def make(self, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
        return self.convert(nn.Linear(self.k, N, dtype=dtype))


def permuted(linear: nn.Linear) -> PackedLinear:
    """The same codes for input channels in another order."""
    source = Int4Linear.from_linear(linear, GROUP_SIZE, symmetric=False)
    layer = Int4Linear(K, N, group_size=GROUP_SIZE, symmetric=False, permuted=True)
    perm = torch.randperm(K, dtype=torch.int32)
    layer.load_state_dict(source.state_dict() | {"perm": perm}, assign=True)
    return layer


def lut4(per: str, scaled: bool) -> Kind:
    shape = {"tensor": (16,), "row": (N, 16), "group": (N, -(-K // GROUP_SIZE), 16)}[per]

    def convert(linear: nn.Linear) -> PackedLinear:
        codebook = torch.randn(shape) * (1.0 if scaled else linear.weight.abs().max().item())
        return Lut4Linear.from_linear(linear, GROUP_SIZE, codebook.to(linear.weight.dtype), scaled)

    name = f"lut4-{per}" + ("" if scaled else "-unscaled")
    options = {"group_size": GROUP_SIZE, "codebook_per": per, "scaled": scaled}
    return Kind(name, Lut4Linear, options, convert)


def fp8(scales_per: str, inputs_per: str | None, static: bool = False) -> Kind:
    def convert(linear: nn.Linear) -> QuantizedLinear:
        scale = torch.tensor([0.01]) if static else None
        return Fp8Linear.from_linear(linear, scales_per, inputs_per, scale)

    options = {"scales_per": scales_per, "inputs_per": inputs_per, "static": static}
    name = f"fp8-{scales_per}-{'static' if static else inputs_per}"
    return Kind(name, Fp8Linear, options, convert)


def w8a8(scales_per: str, static: bool) -> Kind:
    def convert(linear: nn.Linear) -> QuantizedLinear:
        return W8A8Linear.from_linear(linear, scales_per, torch.tensor([0.03]) if static else None)

    inputs_per = "tensor" if static else "token"
    options = {"scales_per": scales_per, "inputs_per": inputs_per, "static": static}
    return Kind(
        f"w8a8-{scales_per}-{'static' if static else 'token'}", W8A8Linear, options, convert
    )


def int8(scales_per: str) -> Kind:
    def convert(linear: nn.Linear) -> QuantizedLinear:
        return Int8Linear.from_linear(linear, scales_per)

    return Kind(f"int8-{scales_per}", Int8Linear, {"scales_per": scales_per}, convert)


def gguf(tensor_type: BlockType) -> Kind:
    def convert(linear: nn.Linear) -> QuantizedLinear:
        return GgufLinear.from_linear(linear, tensor_type)

    return Kind(f"gguf-{tensor_type}", GgufLinear, {"tensor_type": tensor_type}, convert, k=256)


INT4 = Kind(
    "int4",
    Int4Linear,
    {"group_size": GROUP_SIZE, "symmetric": False},
    lambda linear: Int4Linear.from_linear(linear, GROUP_SIZE, symmetric=False),
)
W4A8 = Kind(
    "w4a8",
    W4A8Linear,
    INT4.options,
    lambda linear: W4A8Linear.from_linear(linear, GROUP_SIZE, symmetric=False),
)
KINDS = [
    INT4,
    W4A8,
    Kind(
        "w4a8-two-level",
        W4A8Linear,
        {"group_size": GROUP_SIZE, "two_level": True},
        lambda linear: W4A8Linear.from_linear(linear, GROUP_SIZE, two_level=True),
    ),
    Kind("int4-permuted", Int4Linear, INT4.options | {"permuted": True}, permuted),
    *(lut4(per, scaled) for per in ("tensor", "row", "group") for scaled in (True, False)),
    fp8("tensor", "tensor", static=True),
    fp8("channel", "token"),
    fp8("block", "group"),
    fp8("channel", None),
    w8a8("channel", static=False),
    w8a8("tensor", static=True),
    Kind(
        "w8a8-zeros",
        W8A8Linear,
        {"symmetric_inputs": False},
        lambda linear: W8A8Linear.from_linear(linear, symmetric_inputs=False),
    ),
    *(int8(per) for per in ("tensor", "channel", "group")),
    *(gguf(tensor_type) for tensor_type in LAYOUTS),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As torch.equal, which has no 8-bit floats: those by their bytes."""
    if a.is_floating_point() and a.element_size() == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert same(value, right[key]), key


@each_kind
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)])
def test_any_leading_dimensions(kind: Kind, leading: tuple[int, ...]) -> None:
    layer = kind.make()
    x = torch.randn(*leading, kind.k)
    out = layer(x)
    assert out.shape == (*leading, N)
    rows = [layer(row) for row in x.reshape(-1, kind.k)]
    expected = torch.stack(rows) if rows else torch.empty(0, N)
    torch.testing.assert_close(out.reshape(-1, N), expected)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_added_once(kind: Kind, dtype: torch.dtype) -> None:
    layer = kind.make(dtype)
    assert torch.equal(layer(torch.zeros(4, kind.k, dtype=dtype)), layer.bias.expand(4, -1))


@each_kind
def test_gradient_flows_to_the_input_only(kind: Kind) -> None:
    layer = kind.make()
    x = torch.randn(3, kind.k, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.weight.double().sum(0).float().expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    assert all(not p.requires_grad and p.grad is None for p in layer.parameters())


@each_kind
def test_what_comes_before_a_frozen_weight_trains(kind: Kind) -> None:
    model = nn.Sequential(nn.Linear(kind.k, kind.k), kind.make())
    x, target = torch.randn(16, kind.k), torch.randn(16, N)
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@each_kind
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float16),
    ],
    ids=["half", "bfloat16", "double", "to", "type"],
)
def test_a_cast_touches_only_the_bias(kind: Kind, cast: Callable[[nn.Module], object]) -> None:
    layer = kind.make()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    target = copy.deepcopy(layer)
    cast(nn.Sequential(target))
    assert target.bias.dtype != torch.float32
    assert len(before) >= 3
    for name in before.keys() - {"bias"}:
        after = getattr(target, name)
        assert after.dtype == before[name].dtype, name
        assert same(after, before[name]), name


@each_kind
def test_state_dict_deepcopy_and_pickle_are_exact(kind: Kind, tmp_path: Path) -> None:
    layer = kind.make()
    fresh = kind.empty()
    fresh.load_state_dict(layer.state_dict())
    assert_same_state(layer, fresh)
    assert_same_state(layer, copy.deepcopy(layer))
    assert_same_state(layer, pickle.loads(pickle.dumps(layer)))

    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = kind.empty()
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same_state(layer, fresh)
    x = torch.randn(3, kind.k)
    assert torch.equal(layer(x), fresh(x))


@each_kind
def test_meta_round_trip(kind: Kind) -> None:
    layer = kind.make()
    with torch.device("meta"):
        skeleton = kind.empty()
    assert skeleton.weight.shape == (N, kind.k)
    assert skeleton(torch.empty(4, kind.k, device="meta")).shape == (4, N)
    floats = {name: p.dtype for name, p in skeleton.named_parameters() if p.is_floating_point()}
    skeleton.to(torch.bfloat16)
    assert floats.pop("bias") == torch.float32
    assert floats
    for name, dtype in floats.items():
        assert getattr(skeleton, name).dtype == dtype
    assigned = copy.deepcopy(skeleton)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert_same_state(layer, assigned)
    emptied = skeleton.float().to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    assert_same_state(layer, emptied)


@pytest.mark.gpu
@each_kind
def test_cuda_round_trip_is_exact(kind: Kind) -> None:
    layer = kind.make(torch.bfloat16)
    moved = copy.deepcopy(layer).cuda()
    x = torch.randn(5, kind.k, dtype=torch.bfloat16)
    torch.testing.assert_close(moved(x.cuda()).cpu(), layer(x), rtol=2e-2, atol=2e-2)
    assert_same_state(layer, moved.cpu())


@each_kind
def test_a_state_dict_of_other_layers_may_be_partial(kind: Kind) -> None:
    model = nn.Sequential(kind.make(), nn.Linear(N, 4))
    before = copy.deepcopy(model[0])
    model.load_state_dict({"1.weight": torch.zeros(4, N)}, strict=False)
    assert_same_state(model[0], before)


@each_kind
def test_a_newer_layout_is_refused(kind: Kind) -> None:
    layer = kind.make()
    state = layer.state_dict()
    assert state._metadata[""]["version"] == kind.layer._version
    state._metadata[""]["version"] = kind.layer._version + 1
    with pytest.raises(RuntimeError, match="packed layout version 2 is newer"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("layer", [Int4Linear, Lut4Linear])
@pytest.mark.parametrize("group_size", [0, 16, 48, 256, -2])
def test_wrong_group_sizes(layer: type[PackedLinear], group_size: int) -> None:
    message = rf"group_size must be 32, 64, 128 or -1 .*, got {group_size}"
    with pytest.raises(ValueError, match=message):
        layer(K, N, group_size=group_size)
    with pytest.raises(ValueError, match=message):
        layer.from_linear(nn.Linear(K, N), group_size)


@each_kind
def test_options_make_a_layer_of_the_kind(kind: Kind) -> None:
    """As a run that goes on makes it, from what it has stored; tensors tell the rest."""
    layer = kind.make()
    again = kind.layer(kind.k, N, bias=False, device="meta", **layer.options)
    for name in (*kind.layer.quantised, "bias"):
        again.register_parameter(name, getattr(layer, name))
    assert repr(again) == repr(layer)
    x = torch.randn(3, kind.k)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("layer", [Fp8Linear, Int4Linear, Int8Linear, Lut4Linear, W8A8Linear])
def test_sizes_of_nothing(layer: type[QuantizedLinear]) -> None:
    with pytest.raises(ValueError, match="must be positive, got 0, 4"):
        layer(0, 4)
