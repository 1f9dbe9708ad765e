"""Rounding to nearest, and the in-place swap of a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import effllm
from effllm.nn import Int4Linear
from effllm.quantization.round_to_nearest import round_to_nearest


class Tied(nn.Module):
    """An embedding, a block with a shared layer, and a head on the embedding's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.again = self.up
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(self.up(x).relu() + self.again(x)))


def test_known_symmetric_codes() -> None:
    weight = torch.tensor([[7.5, -7.5, 0.4, -1.6, 0.0, 100.0]])
    codes, scales, zeros = round_to_nearest(weight[:, :5], 32, symmetric=True)
    # scale 7.5 / 7.5 = 1; +7.5 rounds to 8 and is cut to the largest code
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[15, 0, 8, 6, 8]]
    assert zeros is None


def test_known_asymmetric_codes() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0, 1.0], [1.0, 2.0, 3.0, 3.0]])
    codes, scales, zeros = round_to_nearest(weight, 32, symmetric=False)
    assert zeros is not None
    torch.testing.assert_close(scales, torch.tensor([[0.2], [0.2]]))
    assert zeros.tolist() == [[5], [0]]
    assert codes.tolist() == [[0, 5, 15, 10], [5, 10, 15, 15]]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    k=st.integers(1, 140),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    exponent=st.integers(-8, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_at_most_half_a_step(
    n: int, k: int, group_size: int, symmetric: bool, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * 2.0**exponent).to(dtype)
    weight[0, : k // 2] = 0  # whole groups of zeros when K is large enough
    codes, scales, zeros = round_to_nearest(weight, group_size, symmetric)
    assert codes.max() <= 15
    assert scales.dtype == dtype
    assert scales.shape == (n, -(-k // group_size))
    group = torch.arange(k) // group_size
    offset = 8.0 if zeros is None else zeros.double()[:, group]
    step = scales.double()[:, group]
    error = ((codes.double() - offset) * step - weight.double()).abs()
    # 8 (asymmetric: 15) steps from zero, each off by the rounding of the scale to its dtype.
    slack = 16 * torch.finfo(dtype).eps
    assert (error <= step * (0.5 + slack)).all()
    assert (error[weight == 0] == 0).all()


def test_zero_groups_give_zero_not_nan() -> None:
    linear = nn.Linear(128, 64, bias=False)
    nn.init.zeros_(linear.weight)
    for symmetric in (True, False):
        layer = Int4Linear.from_linear(linear, 64, symmetric)
        assert torch.equal(layer.scales, torch.ones(64, 2))
        assert torch.equal(layer.weight, torch.zeros(64, 128))


def test_swap_in_place() -> None:
    model = Tied().eval()
    ids = torch.arange(10)[None]
    before = model(ids)
    effllm.quantize_(model, effllm.Int4Config(group_size=32))
    assert isinstance(model.up, Int4Linear)
    assert isinstance(model.down, Int4Linear)
    assert model.again is model.up
    assert not model.up.training
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight
    error = (model(ids) - before).norm() / before.norm()
    assert 0 < error < 0.1
    weights = {name: p.clone() for name, p in model.named_parameters()}
    effllm.quantize_(model)  # nothing is left to do
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_group_size_minus_one_is_one_group_per_row() -> None:
    model = nn.Sequential(nn.Linear(200, 8))
    effllm.quantize_(model, effllm.Int4Config(group_size=-1, symmetric=False))
    assert model[0].group_size == 200
    assert model[0].scales.shape == model[0].zeros.shape == (8, 1)


def test_filter_gets_module_and_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Sequential(nn.Linear(64, 64))})
    seen: list[str] = []

    def only_b(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        seen.append(name)
        return name == "b.0"

    effllm.quantize_(model, filter_fn=only_b)
    assert seen == ["a", "b.0"]
    assert type(model["a"]) is nn.Linear
    assert isinstance(model["b"][0], Int4Linear)


def test_errors_name_the_layer() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))})
    with torch.no_grad():
        model["blocks"][1].weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'blocks\.1': weight holds NaN or infinity"):
        effllm.quantize_(model)
    with pytest.raises(ValueError, match=r"layer 'blocks\.0': weight is on the meta device"):
        effllm.quantize_(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 4, device="meta"))}))
    with pytest.raises(ValueError, match=r"the model itself is an nn\.Linear"):
        effllm.quantize_(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="group_size must be 32, 64, 128 or -1"):
        effllm.Int4Config(group_size=100)


def test_an_interrupt_leaves_a_model_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    convert = Int4Linear.from_codes
    calls = []

    def interrupted(linear: nn.Linear, *args: Any, **kwargs: Any) -> Int4Linear:
        calls.append(linear)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return convert(linear, *args, **kwargs)

    monkeypatch.setattr(Int4Linear, "from_codes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        effllm.quantize_(model)
    assert [type(layer) for layer in model] == [Int4Linear, Int4Linear, nn.Linear, nn.Linear]
    assert torch.isfinite(model(torch.randn(2, 64))).all()


@pytest.mark.gpu
def test_the_gpu_quantises_as_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(200, 70, dtype=torch.bfloat16))
    other = nn.Sequential(nn.Linear(200, 70, dtype=torch.bfloat16)).cuda()
    other.load_state_dict(model.state_dict())
    config = effllm.Int4Config(group_size=128, symmetric=False)
    effllm.quantize_(model, config)
    effllm.quantize_(other, config)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name].cpu()), name
