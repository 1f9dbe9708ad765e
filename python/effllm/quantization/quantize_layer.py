"""One layer: codes by its method, the layer over them, and the errors."""

from __future__ import annotations

from torch import nn

from effllm.nn.quantized_linear import QuantizedLinear, frozen
from effllm.quantization.folding import Fold
from effllm.quantization.method import GgufCodes
from effllm.quantization.report import LayerResult
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.targets import Target


def quantise_layer(
    target: Target, inputs: InputStatistics | None
) -> tuple[QuantizedLinear, LayerResult]:
    """The layer that takes the place of the target's, and its errors.

    Raises:
        ValueError: the method cannot quantise the weight; the message names the layer.
    """
    name, method, linear = target.names[0], target.method, target.linear
    weight = linear.weight.detach()
    try:
        codes = method.quantise(weight, inputs)
        layer = method.layer(codes, linear)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"effllm.quantize_: layer '{name}': {error}") from error
    difference = codes.dense() - weight.float()
    output_error = None
    if inputs is not None and inputs.tokens:
        energy = inputs.output_energy(weight)
        output_error = inputs.output_energy(difference) / energy if energy else 0.0
    energy = float(weight.float().square().sum())
    return layer, LayerResult(
        name=name,
        method=method.name,
        # A type of GGUF may fall back to another.
        bits=codes.bits if isinstance(codes, GgufCodes) else method.bits,
        granularity=str(method.granularity),
        weight_error=float(difference.square().sum()) / energy if energy else 0.0,
        output_error=output_error,
        tokens=0 if inputs is None else inputs.tokens,
        bytes=sum(p.nbytes for name, p in layer.named_parameters() if name != "bias"),
    )


def quantise_alone(target: Target, inputs: InputStatistics) -> LayerResult:
    """The errors of a layer by itself: where its method scales inputs, as if all scales that it
    finds for this layer could be folded away. The weight's error is then of the scaled weight.

    Raises what ``quantise_layer`` raises.
    """
    linear, method = target.linear, target.method
    if method.scales_inputs:
        weight = linear.weight.detach()
        fold = Fold(linear, [linear], (1, linear.in_features))
        scales = method.input_scales([weight], inputs, fold)
        linear = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        linear.weight = frozen((weight.float() * scales).to(weight.dtype))
        inputs = inputs.scaled(scales)
    return quantise_layer(Target(linear, target.names, method), inputs)[1]
