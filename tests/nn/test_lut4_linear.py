"""Lut4Linear: values against a float64 decoding, NF4, parts of a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effllm.nn import Lut4Linear
from effllm.ops.int4_unpack import int4_unpack_ref
from effllm.quantization import NF4

# (in_features, out_features, group_size): whole tiles; short last tile and group; one group per row
SHAPES = [(128, 64, 64), (100, 70, 32), (200, 12, 128), (72, 8, -1)]
PER = ["tensor", "row", "group"]


def quantised(
    k: int = 100,
    n: int = 70,
    group_size: int = 32,
    *,
    per: str = "nf4",
    scaled: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Lut4Linear:
    linear = nn.Linear(k, n, bias, dtype=dtype)
    if per == "nf4":
        return Lut4Linear.from_linear(linear, group_size, scaled=scaled)
    groups = 1 if group_size == -1 else -(-k // group_size)
    shape = {"tensor": (16,), "row": (n, 16), "group": (n, groups, 16)}[per]
    codebook = torch.randn(shape) * (1.0 if scaled else linear.weight.abs().max().item())
    return Lut4Linear.from_linear(linear, group_size, codebook.to(dtype), scaled)


def reference_weight(layer: Lut4Linear) -> Tensor:
    """The documented formula in float64, from the unpacking that is written in plain PyTorch."""
    n, k = layer.out_features, layer.in_features
    codes = int4_unpack_ref(layer.qweight, n, k).long().unsqueeze(-1)
    group = torch.arange(k) // layer.group_size
    tables = layer.codebook.double()
    tables = (
        tables if tables.dim() == 3 else tables.view(-1, 1, 16).expand(n, int(group[-1]) + 1, 16)
    )
    weight = tables[:, group].gather(2, codes).squeeze(-1)
    return weight if layer.scales is None else weight * layer.scales.double()[:, group]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("k", "n", "group_size"), SHAPES)
def test_forward_matches_the_formula(
    k: int, n: int, group_size: int, per: str, scaled: bool, bias: bool
) -> None:
    layer = quantised(k, n, group_size, per=per, scaled=scaled, bias=bias)
    x = torch.randn(2, 3, k)
    expected = x.double() @ reference_weight(layer).T + (layer.bias.double() if bias else 0.0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.double(), reference_weight(layer), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_of_a_layer(dtype: torch.dtype) -> None:
    linear = nn.Linear(256, 64, dtype=dtype)
    layer = Lut4Linear.from_linear(linear, 64)
    assert torch.equal(layer.codebook, torch.tensor(NF4).to(dtype))
    assert layer.codebook.dtype == layer.scales.dtype == dtype
    groups = linear.weight.detach().view(64, 4, 64)
    assert torch.equal(layer.scales, groups.abs().amax(-1))
    # Half the widest gap between entries, times the scale, and what 16 bits round.
    error = (layer.weight - linear.weight).view(64, 4, 64).abs().amax(-1)
    assert (error.float() <= (0.152 + 0.008) * layer.scales.float()).all()


def test_a_codebook_is_copied_and_keeps_its_dtype() -> None:
    codebook = torch.randn(16, dtype=torch.float32)
    layer = Lut4Linear.from_linear(nn.Linear(64, 64).bfloat16(), 64, codebook)
    assert layer.codebook.dtype == torch.float32
    assert layer.scales.dtype == torch.bfloat16
    before = layer.codebook.clone()
    codebook.zero_()
    assert torch.equal(layer.codebook, before)


@pytest.mark.parametrize("strict", [True, False])
def test_half_a_weight_is_an_error_even_if_not_strict(strict: bool) -> None:
    layer = nn.Sequential(quantised())
    state = layer.state_dict()
    del state["0.codebook"]
    with pytest.raises(RuntimeError, match=r"0: a Lut4Linear with scales loads .*codebook"):
        layer.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=r"the state dict has \['weight'\]"):
        layer.load_state_dict({"0.weight": torch.randn(70, 100)}, strict=strict)
    with pytest.raises(RuntimeError, match="without scales"):
        nn.Sequential(quantised(scaled=False)).load_state_dict(layer.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.codebook"):
        nn.Sequential(quantised(per="row")).load_state_dict(layer.state_dict(), strict=strict)


def test_errors_of_the_constructors() -> None:
    with pytest.raises(ValueError, match=r"codebook_per must be .*, got 'column'"):
        Lut4Linear(100, 70, group_size=32, codebook_per="column")  # type: ignore[arg-type]
    linear = nn.Linear(100, 70)
    with pytest.raises(ValueError, match="codebook must be 'nf4' or a tensor, got 'nf5'"):
        Lut4Linear.from_linear(linear, 32, "nf5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[70, 16\] or \[70, 4, 16\], got .* \[71, 16\]"):
        Lut4Linear.from_linear(linear, 32, torch.ones(71, 16))
    with pytest.raises(ValueError, match="weight is on the meta device"):
        Lut4Linear.from_linear(nn.Linear(100, 70, device="meta"), 32)


def test_shapes_and_repr() -> None:
    layer = quantised(per="group")
    assert layer.qweight.shape == (2, 1024)
    assert layer.qweight.dtype == torch.int32
    assert layer.codebook.shape == (70, 4, 16)
    assert layer.scales.shape == (70, 4)
    assert repr(layer) == (
        "Lut4Linear(in_features=100, out_features=70, bias=True, group_size=32, "
        "codebook_per='group', scaled=True)"
    )
