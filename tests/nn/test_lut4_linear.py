"""Lut4Linear: values against a float64 decoding, and exact round trips of its state."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


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


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)])
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer = quantised()
    x = torch.randn(*leading, 100)
    out = layer(x)
    assert out.shape == (*leading, 70)
    rows = [layer(row) for row in x.reshape(-1, 100)]
    expected = torch.stack(rows) if rows else torch.empty(0, 70)
    torch.testing.assert_close(out.reshape(-1, 70), expected)


def test_gradient_flows_to_the_input_only() -> None:
    layer = quantised(per="group")
    x = torch.randn(3, 100, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad, reference_weight(layer).sum(0).float().expand(3, -1), rtol=1e-5, atol=1e-5
    )
    assert all(not p.requires_grad and p.grad is None for p in layer.parameters())


def test_what_comes_before_a_frozen_weight_trains() -> None:
    model = nn.Sequential(nn.Linear(100, 100), quantised())
    x, target = torch.randn(16, 100), torch.randn(16, 70)
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


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
    layer = quantised()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    target = copy.deepcopy(layer)
    cast(nn.Sequential(target))
    assert target.bias.dtype != torch.float32
    for name in ("qweight", "codebook", "scales"):
        after = getattr(target, name)
        assert after.dtype == before[name].dtype, name
        assert torch.equal(after, before[name]), name


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("per", PER)
def test_state_dict_deepcopy_and_pickle_are_exact(tmp_path: Path, per: str, scaled: bool) -> None:
    def empty() -> Lut4Linear:
        return Lut4Linear(100, 70, group_size=32, codebook_per=per, scaled=scaled)

    layer = quantised(per=per, scaled=scaled)
    fresh = empty()
    fresh.load_state_dict(layer.state_dict())
    assert_same_state(layer, fresh)
    assert_same_state(layer, copy.deepcopy(layer))
    assert_same_state(layer, pickle.loads(pickle.dumps(layer)))

    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = empty()
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same_state(layer, fresh)
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), fresh(x))


def test_meta_round_trip() -> None:
    layer = quantised()
    with torch.device("meta"):
        skeleton = Lut4Linear(100, 70, group_size=32)
    assert skeleton.weight.shape == (70, 100)
    assert skeleton(torch.empty(4, 100, device="meta")).shape == (4, 70)
    skeleton.to(torch.bfloat16)
    assert skeleton.codebook.dtype == skeleton.scales.dtype == torch.float32
    assigned = copy.deepcopy(skeleton)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert_same_state(layer, assigned)
    emptied = skeleton.float().to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    assert_same_state(layer, emptied)


@pytest.mark.gpu
@pytest.mark.parametrize("per", PER)
def test_cuda_round_trip_is_exact(per: str) -> None:
    layer = quantised(per=per, dtype=torch.bfloat16)
    moved = copy.deepcopy(layer).cuda()
    x = torch.randn(5, 100, dtype=torch.bfloat16)
    torch.testing.assert_close(moved(x.cuda()).cpu(), layer(x), rtol=2e-2, atol=2e-2)
    assert_same_state(layer, moved.cpu())


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
    with pytest.raises(ValueError, match=r"group_size must be 32, 64, 128 or -1 .*, got 48"):
        Lut4Linear(100, 70, group_size=48)
    with pytest.raises(ValueError, match="must be positive, got 0, 4"):
        Lut4Linear(0, 4)
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
