"""One layer: codes by its method, the layer over them, and the errors."""

from __future__ import annotations

from effllm.nn.packed_linear import PackedLinear
from effllm.quantization.report import LayerResult
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.targets import Target


def quantise_layer(
    target: Target, inputs: InputStatistics | None
) -> tuple[PackedLinear, LayerResult]:
    """The layer that takes the place of the target's, and its errors.

    Raises:
        ValueError: the method cannot quantise the weight; the message names the layer.
    """
    name, method, linear = target.names[0], target.method, target.linear
    weight = linear.weight.detach()
    try:
        codes = method.quantise(weight, inputs)
        layer = codes.layer(linear)
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
        bits=method.bits,
        granularity=str(method.granularity),
        weight_error=float(difference.square().sum()) / energy if energy else 0.0,
        output_error=output_error,
        tokens=0 if inputs is None else inputs.tokens,
    )
