"""Int4Linear: values against a float64 dequantisation, permuted inputs, parts of a weight."""

from __future__ import annotations

import pytest
import torch
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


def test_shapes_and_repr() -> None:
    layer = quantised()
    assert layer.qweight.shape == (2, 1024)
    assert layer.qweight.dtype == torch.int32
    assert layer.scales.shape == layer.zeros.shape == (70, 4)
    assert repr(layer) == (
        "Int4Linear(in_features=100, out_features=70, bias=True, group_size=32, symmetric=False)"
    )
