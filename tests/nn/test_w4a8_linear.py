"""W4A8Linear: values against the definition, rounded inputs, and what it shares with Int4Linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.nn import Int4Linear, W4A8Linear
from effllm.ops.int4_gemm import dequantize_codes
from effllm.ops.int4_unpack import int4_unpack_ref
from effllm.ops.int8_quantize import int8_quantize_ref
from effllm.ops.w4a8_gemm import w4a8_gemm_ref
from effllm.quantization import (
    AwqConfig,
    GptqConfig,
    Granularity,
    Int4Config,
    LinearConfig,
    dequantize_,
)
from effllm.testing.compare import assert_equal

K, N = 300, 200
TOKEN = Granularity.token()


def permuted(layer: W4A8Linear) -> tuple[W4A8Linear, Tensor]:
    """The same codes for input channels in another order."""
    perm = torch.randperm(K)
    other = W4A8Linear(K, N, group_size=layer.group_size, symmetric=False, permuted=True)
    other.load_state_dict(layer.state_dict() | {"perm": perm.int()}, assign=True)
    return other, perm


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_definition(dtype: torch.dtype, group_size: int, symmetric: bool) -> None:
    layer = W4A8Linear.from_linear(nn.Linear(K, N, dtype=dtype), group_size, symmetric)
    x = (torch.randn(2, 3, K) * torch.logspace(-2, 1, 3)[:, None]).to(dtype)
    codes, x_scales = int8_quantize_ref(x)
    expected = w4a8_gemm_ref(
        codes,
        x_scales,
        layer.qweight,
        layer.scales,
        layer.zeros,
        layer.bias,
        group_size=layer.group_size,
        out_dtype=dtype,
    )
    found = layer(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_levels_are_the_definition_to_the_bit(dtype: torch.dtype, group_size: int) -> None:
    layer = W4A8Linear.from_linear(nn.Linear(K, N, dtype=dtype), group_size, two_level=True)
    x = (torch.randn(2, 3, K) * torch.logspace(-2, 1, 3)[:, None]).to(dtype)
    codes, x_scales = int8_quantize_ref(x)
    expected = w4a8_gemm_ref(
        codes,
        x_scales,
        layer.qweight,
        layer.scales,
        None,
        layer.bias,
        layer.multipliers,
        group_size=layer.group_size,
        out_dtype=dtype,
    )
    assert_equal(layer(x), expected)
    # And by the scales that it says it has.
    weight = dequantize_codes(
        int4_unpack_ref(layer.qweight, N, K), layer.group_scales, group_size=layer.group_size
    )
    dense = nn.functional.linear(codes * x_scales, weight, layer.bias.float())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(layer(x).float(), dense, rtol=tolerance, atol=tolerance)


def test_two_levels_with_zero_points_are_refused() -> None:
    with pytest.raises(ValueError, match="two_level needs symmetric=True, got False"):
        W4A8Linear(K, N, symmetric=False, two_level=True)
    with pytest.raises(ValueError, match="two_level has no zero points, got zeros"):
        W4A8Linear.from_linear(nn.Linear(K, N), 64, symmetric=False, two_level=True)


def test_outputs_are_near_those_of_int4_linear() -> None:
    linear = nn.Linear(K, N)
    x = torch.randn(16, K)
    exact = Int4Linear.from_linear(linear, 64)(x)
    found = W4A8Linear.from_linear(linear, 64)(x)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02


def test_permuted_inputs() -> None:
    layer = W4A8Linear.from_linear(nn.Linear(K, N), 64, symmetric=False)
    other, perm = permuted(layer)
    x = torch.randn(4, K)
    shuffled = torch.empty_like(x).index_copy_(1, perm, x)
    assert_equal(other(shuffled), layer(x))
    assert_equal(other.weight[:, perm], layer.weight)


def test_permuted_inputs_of_two_levels() -> None:
    layer = W4A8Linear.from_linear(nn.Linear(K, N), 64, two_level=True)
    perm = torch.randperm(K)
    other = W4A8Linear(K, N, group_size=64, permuted=True, two_level=True)
    other.load_state_dict(layer.state_dict() | {"perm": perm.int()})
    x = torch.randn(4, K, requires_grad=True)
    shuffled = torch.empty_like(x).index_copy_(1, perm, x)
    assert_equal(other(shuffled).detach(), layer(x).detach())
    assert_equal(other.weight[:, perm], layer.weight)
    other(shuffled).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_permuted", [False, True])
def test_rounding_inputs_is_the_identity_backwards(is_permuted: bool) -> None:
    layer = W4A8Linear.from_linear(nn.Linear(K, N), 64, symmetric=False)
    if is_permuted:
        layer, _ = permuted(layer)
    x = torch.randn(4, K, requires_grad=True)
    grad = torch.randn(4, N)
    out = layer(x)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_equal(layer(x), out.detach())


@pytest.mark.parametrize("kind", ["plain", "permuted", "two-level"])
def test_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    two_level = kind == "two-level"
    layer = W4A8Linear.from_linear(nn.Linear(K, N), 64, symmetric=two_level, two_level=two_level)
    if kind == "permuted":
        layer, _ = permuted(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    torch.testing.assert_close(compiled(x), layer(x))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    layer(ours).sum().backward()
    compiled(theirs).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LinearConfig, {"bits": 3}),
        (Int4Config, {"group_size": 32, "symmetric": False}),
        (AwqConfig, {}),
        (GptqConfig, {}),
        (GptqConfig, {"static_groups": False}),
    ],
)
def test_configs_make_it_with_the_codes_that_they_make_without(
    method: type[LinearConfig], options: dict[str, Any]
) -> None:
    model, plain = Block(), Block()
    plain.load_state_dict(model.state_dict())
    for block, inputs in ((model, TOKEN), (plain, None)):
        config = method(**options, inputs=inputs, two_level=False)
        data = [{"x": torch.randn(32, 64, generator=torch.Generator().manual_seed(1))}]
        calibration = data if config.needs_calibration else None
        effllm.quantize_(block, config, calibration=calibration, progress=False)
    assert type(model.up) is type(model.down) is W4A8Linear
    assert type(plain.up) is type(plain.down) is Int4Linear
    # Of the first layer: calibration of the second sees what rounded inputs make of it.
    for name, tensor in plain.up.state_dict().items():
        assert_equal(model.up.state_dict()[name], tensor, name=name)
    assert_equal(dequantize_(model).up.weight, plain.up.weight)


@pytest.mark.parametrize("two_level", [False, True])
def test_an_interrupted_run_comes_back_as_it_was(tmp_path: Path, two_level: bool) -> None:
    config, data = GptqConfig(inputs=TOKEN, two_level=two_level), [{"x": torch.randn(32, 64)}]
    model = Block()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    effllm.quantize_(model, config, calibration=data, state=tmp_path, progress=False)
    again = Block()
    again.load_state_dict(start)
    effllm.quantize_(again, config, calibration=data, state=tmp_path, progress=False)
    assert type(again.up) is W4A8Linear
    assert repr(again) == repr(model)
    for name, tensor in model.state_dict().items():
        assert_equal(again.state_dict()[name], tensor, name=name)


@pytest.mark.parametrize(
    "inputs", [Granularity.tensor(), Granularity.channel(), Granularity.group(64)], ids=str
)
def test_other_inputs_are_refused(inputs: Granularity) -> None:
    for config in (LinearConfig, GptqConfig, AwqConfig, Int4Config):
        with pytest.raises(
            ValueError, match=rf"inputs must be token\(\) or None, got {inputs.kind}"
        ):
            config(inputs=inputs)
