"""All methods on either device: the errors are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm import analysis
from effllm.quantization import (
    AwqConfig,
    GgufConfig,
    GptqConfig,
    Granularity,
    KMeansConfig,
    LinearConfig,
    Method,
    choose_configs,
    dequantize_,
    smooth_,
)

GROUP = Granularity.group(32)
METHODS: dict[str, Method] = {
    "linear": LinearConfig(3, GROUP, symmetric=False, clip=True),
    "gptq": GptqConfig(3, GROUP, symmetric=False, clip=True),
    "gptq, permuted": GptqConfig(4, GROUP, static_groups=False),
    "awq": AwqConfig(3, GROUP),
    "k-means": KMeansConfig(3, GROUP, weighted=True),
    "q4_0": GgufConfig("q4_0"),
    "q4_1": GgufConfig("q4_1"),
}


def model_and_batches(
    device: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[Tensor]]:
    """A norm and two layers: of a width beyond a block of GPTQ, and with a short group."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(160), nn.Linear(160, 80, bias=False), nn.ReLU(), nn.Linear(80, 48)
    )
    model[0].weight.data.normal_().exp_()
    batches = [torch.randn(64, 160) @ torch.randn(160, 160) for _ in range(3)]
    return model.to(device, dtype), [batch.to(device, dtype) for batch in batches]


@torch.no_grad()
def output_error(method: Method, device: str) -> tuple[float, list[float]]:
    """Of the model with decoded weights, in fp64 on the CPU, and those of the report."""
    model, batches = model_and_batches(device, torch.bfloat16)
    exact, x = model(batches[0]).cpu().double(), batches[0]
    report = effllm.quantize_(model, method, calibration=batches, progress=False)
    assert all(p.device.type == device for p in model.parameters())
    difference = dequantize_(model, torch.bfloat16)(x).cpu().double() - exact
    error = float(difference.square().sum() / exact.square().sum())
    return error, [layer.output_error or 0.0 for layer in report.layers]


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_of_the_cpu(method: str, device: str) -> None:
    """One code that falls the other way moves what comes after it, so not all codes are equal."""
    error, layers = output_error(METHODS[method], device)
    expected, expected_layers = output_error(METHODS[method], "cpu")
    assert 0 < error < 0.2
    assert error == pytest.approx(expected, rel=0.1)
    assert layers == pytest.approx(expected_layers, rel=0.05)


@pytest.mark.gpu
def test_float32_on_cuda_is_refused_before_anything_is_done() -> None:
    """Where no blocks are; without calibration nothing runs there in float32."""
    model, batches = model_and_batches("cuda")
    with pytest.raises(
        ValueError, match=r"layer '1' is in no block and has float32 weights on cuda"
    ):
        effllm.quantize_(model, METHODS["gptq"], calibration=batches, progress=False)
    assert type(model[1]) is nn.Linear
    effllm.quantize_(model, METHODS["linear"], progress=False)


def test_choices_and_analysis(device: str) -> None:
    model, batches = model_and_batches(device)
    options = [LinearConfig(bits, GROUP) for bits in (2, 4)]
    chosen = choose_configs(model, options, batches, average_bits=3, progress=False)
    assert sorted(config.bits for config in chosen.values()) == [2, 4]
    errors = analysis.layer_errors(model, METHODS, batches, progress=False)
    assert all(0 < r.output_error < 0.2 for results in errors.values() for r in results)
    x = analysis.layer_inputs(model, batches)["1"]
    assert x.device.type == device
    assert sum(analysis.histogram(x).counts) == x.numel()
    assert len(analysis.find_outliers(x).channel_peaks) == 160
    found = analysis.activation_errors(x, model[1].weight)
    assert found[0].error < found[3].error
    assert min(analysis.scale_search(model[1].weight, x).errors) > 0
    assert smooth_(model, batches, alpha=None, progress=False) == {"0": ["1"], "1": ["3"]}
