"""Int8Linear: values against the definition in float64, parts of a weight, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from effllm.nn import Int8Linear
from effllm.quantization import Granularity, LinearConfig

SCALES = ("tensor", "channel", "group")
K, N = 300, 200


@pytest.mark.parametrize("scales_per", SCALES)
def test_forward_is_the_definition(scales_per: Any) -> None:
    layer = Int8Linear.from_linear(nn.Linear(K, N), scales_per)
    x = torch.randn(2, 3, K) * torch.logspace(-2, 1, 3)[:, None]
    scales = layer.scales.double()
    if scales_per == "group":
        scales = scales[:, torch.arange(K) // 128]
    expected = x.double() @ (layer.qweight.double() * scales).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales_per", SCALES)
def test_weight_is_near_the_dense_one(scales_per: Any) -> None:
    """By half a step of its scale, which is that of the largest weight it is for."""
    linear = nn.Linear(K, N)
    linear.weight.data[7, 200] *= 1000
    layer = Int8Linear.from_linear(linear, scales_per)
    assert layer.scales_per == scales_per
    assert layer.scales.numel() == {"tensor": 1, "channel": N, "group": 3 * N}[scales_per]
    error = (layer.weight - linear.weight).abs()
    scales = layer.scales
    if scales_per == "group":
        scales = scales[:, torch.arange(K) // 128]
    assert (error <= scales * 0.5001).all()
    small = {"tensor": error[:0], "channel": error[8:], "group": error[7, :128]}[scales_per]
    assert small.numel() == 0 or small.max() < 1e-3
    assert error.max() > 0.01


@pytest.mark.parametrize("scales_per", SCALES)
def test_compiles_without_graph_breaks(scales_per: Any) -> None:
    torch._dynamo.reset()
    layer = Int8Linear.from_linear(nn.Linear(K, N), scales_per)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    torch.testing.assert_close(compiled(x), layer(x))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    layer(ours).sum().backward()
    compiled(theirs).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad)


def test_rows_and_groups_may_be_on_several_ranks() -> None:
    """Slices of rows, and of columns at multiples of 128, with the scales that are theirs."""
    layer = Int8Linear.from_linear(nn.Linear(256, N, bias=False), "group")
    x = torch.randn(3, 256)
    parts = []
    for columns in (slice(0, 128), slice(128, 256)):
        rows = []
        for chosen in (slice(0, 70), slice(70, N)):
            shard = Int8Linear(128, chosen.stop - chosen.start, bias=False)
            shard.qweight.data = layer.qweight[chosen, columns]
            shard.scales.data = layer.scales[chosen, columns.start // 128, None]
            rows.append(shard(x[:, columns]))
        parts.append(torch.cat(rows, -1))
    torch.testing.assert_close(parts[0] + parts[1], layer(x))


def test_repr() -> None:
    assert repr(Int8Linear(K, N, scales_per="group")) == (
        "Int8Linear(in_features=300, out_features=200, bias=True, scales_per='group', "
        "inputs_per=None, static=False)"
    )


WORDS = [
    ({"scales_per": "block"}, "scales_per must be 'tensor', 'channel' or 'group', got 'block'"),
    ({"inputs_per": "token"}, "inputs_per must be None, got 'token'"),
    ({"static": True}, "a static scale is of inputs_per='tensor', got None"),
]


@pytest.mark.parametrize(("options", "message"), WORDS)
def test_other_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Linear(K, N, **options)


@pytest.mark.parametrize("granularity", [Granularity.channel(), Granularity.group(128)], ids=str)
def test_scales_of_a_narrow_dtype(granularity: Granularity) -> None:
    """As a method finds them: codes fit scales that bf16 holds."""
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    layer = LinearConfig(8, granularity).quantise(linear.weight.detach(), None).layer(linear)
    assert isinstance(layer, Int8Linear)
    assert torch.equal(layer.scales, layer.scales.bfloat16().float())
    x = torch.randn(4, K, dtype=torch.bfloat16)
    scales = layer.scales.double()
    if granularity.kind == "group":
        scales = scales[:, torch.arange(K) // 128]
    exact = x.double() @ (layer.qweight.double() * scales).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("scales_per", SCALES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gpu_computes_the_same(scales_per: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    here = Int8Linear.from_linear(nn.Linear(K, N, dtype=dtype), scales_per)
    x = torch.randn(7, K, dtype=dtype)
    expected = here(x)
    torch.testing.assert_close(here.cuda()(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)
