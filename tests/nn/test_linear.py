"""Int4Linear: values against a float64 dequantisation, and exact round trips of its state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effllm.nn import Int4Linear
from effllm.ops.int4_unpack import int4_unpack_ref

# (in_features, out_features, group_size): whole tiles; short last tile and group; one group per row
SHAPES = [(128, 64, 64), (100, 70, 32), (200, 12, 128), (72, 8, -1)]


def quantised(
    k: int = 100,
    n: int = 70,
    group_size: int = 32,
    *,
    symmetric: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Int4Linear:
    return Int4Linear.from_linear(nn.Linear(k, n, bias, dtype=dtype), group_size, symmetric)


def permuted(k: int = 100, n: int = 70) -> Int4Linear:
    """The same codes for input channels in another order."""
    source = quantised(k, n)
    layer = Int4Linear(k, n, group_size=32, symmetric=False, permuted=True)
    perm = torch.randperm(k, dtype=torch.int32)
    layer.load_state_dict(source.state_dict() | {"perm": perm})
    return layer


def reference_weight(layer: Int4Linear) -> Tensor:
    """The documented formula in float64, from the unpacking that is written in plain PyTorch."""
    codes = int4_unpack_ref(layer.qweight, layer.out_features, layer.in_features).double()
    group = torch.arange(layer.in_features) // layer.group_size
    zeros = 8.0 if layer.zeros is None else layer.zeros.double()[:, group]
    weight = (codes - zeros) * layer.scales.double()[:, group]
    return weight if layer.perm is None else weight[:, layer.perm.long().argsort()]


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
def test_forward_matches_the_formula(k: int, n: int, group_size: int, symmetric: bool) -> None:
    layer = quantised(k, n, group_size, symmetric=symmetric)
    x = torch.randn(2, 3, k)
    expected = x.double() @ reference_weight(layer).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.double(), reference_weight(layer), rtol=1e-6, atol=0)


def test_permuted_inputs() -> None:
    layer = permuted()
    x = torch.randn(2, 3, 100, requires_grad=True)
    expected = x.double() @ reference_weight(layer).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.double(), reference_weight(layer), rtol=1e-6, atol=0)
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad, reference_weight(layer).sum(0).float().expand_as(x), rtol=1e-5, atol=1e-5
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert repr(layer).endswith("symmetric=False, permuted=True)")


@pytest.mark.parametrize("strict", [True, False])
def test_permutations_of_inputs_are_part_of_the_weight(strict: bool) -> None:
    plain, layer = quantised(), permuted()
    with pytest.raises(RuntimeError, match="with zero points and permuted inputs loads"):
        layer.load_state_dict(plain.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"loads \['qweight', 'scales', 'zeros'\] together"):
        plain.load_state_dict(layer.state_dict(), strict=strict)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)])
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer = quantised()
    x = torch.randn(*leading, 100)
    out = layer(x)
    assert out.shape == (*leading, 70)
    rows = [layer(row) for row in x.reshape(-1, 100)]
    expected = torch.stack(rows) if rows else torch.empty(0, 70)
    torch.testing.assert_close(out.reshape(-1, 70), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_added_once(dtype: torch.dtype) -> None:
    layer = quantised(dtype=dtype)
    assert torch.equal(layer(torch.zeros(4, 100, dtype=dtype)), layer.bias.expand(4, -1))


def test_gradient_flows_to_the_input_only() -> None:
    layer = quantised()
    x = torch.randn(3, 100, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad, reference_weight(layer).sum(0).float().expand(3, -1), rtol=1e-5, atol=1e-5
    )
    assert all(not p.requires_grad and p.grad is None for p in layer.parameters())


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
def test_a_cast_touches_only_the_bias(cast) -> None:
    layer = permuted()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    target = copy.deepcopy(layer)
    cast(nn.Sequential(target))
    assert target.bias.dtype != torch.float32
    for name in ("qweight", "scales", "zeros", "perm"):
        after = getattr(target, name)
        assert after.dtype == before[name].dtype, name
        assert torch.equal(after, before[name]), name


@pytest.mark.parametrize("make", [quantised, permuted])
def test_state_dict_deepcopy_and_pickle_are_exact(
    make: Callable[[], Int4Linear], tmp_path: Path
) -> None:
    layer = make()
    options = {"group_size": 32, "symmetric": False, "permuted": layer.perm is not None}
    fresh = Int4Linear(100, 70, **options)
    fresh.load_state_dict(layer.state_dict())
    assert_same_state(layer, fresh)
    assert_same_state(layer, copy.deepcopy(layer))
    assert_same_state(layer, pickle.loads(pickle.dumps(layer)))

    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = Int4Linear(100, 70, **options)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same_state(layer, fresh)
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("make", [quantised, permuted])
def test_meta_round_trip(make: Callable[[], Int4Linear]) -> None:
    layer = make()
    with torch.device("meta"):
        skeleton = Int4Linear(
            100, 70, group_size=32, symmetric=False, permuted=layer.perm is not None
        )
    assert skeleton.weight.shape == (70, 100)
    assert skeleton(torch.empty(4, 100, device="meta")).shape == (4, 70)
    skeleton.to(torch.bfloat16)
    assert skeleton.scales.dtype == torch.float32
    assigned = copy.deepcopy(skeleton)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert_same_state(layer, assigned)
    emptied = skeleton.float().to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    assert_same_state(layer, emptied)


@pytest.mark.gpu
def test_cuda_round_trip_is_exact() -> None:
    layer = quantised(dtype=torch.bfloat16)
    moved = copy.deepcopy(layer).cuda()
    x = torch.randn(5, 100, dtype=torch.bfloat16)
    torch.testing.assert_close(moved(x.cuda()).cpu(), layer(x), rtol=2e-2, atol=2e-2)
    assert_same_state(layer, moved.cpu())


@pytest.mark.parametrize("strict", [True, False])
def test_half_a_weight_is_an_error_even_if_not_strict(strict: bool) -> None:
    layer = nn.Sequential(quantised())
    state = layer.state_dict()
    del state["0.scales"]
    with pytest.raises(RuntimeError, match=r"0: an Int4Linear with zero points loads .*scales"):
        layer.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=r"the state dict has \['weight'\]"):
        layer.load_state_dict({"0.weight": torch.randn(70, 100)}, strict=strict)
    with pytest.raises(RuntimeError, match="with no zero points"):
        nn.Sequential(quantised(symmetric=True)).load_state_dict(layer.state_dict(), strict=strict)


def test_a_state_dict_of_other_layers_may_be_partial() -> None:
    model = nn.Sequential(quantised(), nn.Linear(70, 4))
    before = copy.deepcopy(model[0])
    model.load_state_dict({"1.weight": torch.zeros(4, 70)}, strict=False)
    assert_same_state(model[0], before)


def test_a_newer_layout_is_refused() -> None:
    layer = quantised()
    state = layer.state_dict()
    assert state._metadata[""]["version"] == Int4Linear._version
    state._metadata[""]["version"] = Int4Linear._version + 1
    with pytest.raises(RuntimeError, match="packed layout version 2 is newer"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("group_size", [0, 16, 48, 256, -2])
def test_wrong_group_sizes(group_size: int) -> None:
    message = rf"group_size must be 32, 64, 128 or -1 .*, got {group_size}"
    with pytest.raises(ValueError, match=message):
        Int4Linear(100, 70, group_size=group_size)
    with pytest.raises(ValueError, match=message):
        quantised(group_size=group_size)


def test_shapes_and_repr() -> None:
    layer = quantised()
    assert layer.qweight.shape == (2, 1024)
    assert layer.qweight.dtype == torch.int32
    assert layer.scales.shape == layer.zeros.shape == (70, 4)
    assert repr(layer) == (
        "Int4Linear(in_features=100, out_features=70, bias=True, group_size=32, symmetric=False)"
    )
    with pytest.raises(ValueError, match="must be positive, got 0, 4"):
        Int4Linear(0, 4)
