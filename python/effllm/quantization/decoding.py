"""Quantised layers back to dense ones that compute the same."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from effllm.nn.quantized_linear import QuantizedLinear, frozen


def dequantize_(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    kind: type[QuantizedLinear] = QuantizedLinear,
) -> nn.Module:
    """Replaces quantised layers by ``nn.Linear`` with their weights, in place.

    The model is as large as before it was quantised, and as good as the quantised one: for products
    over many tokens, for other software, and for transformers' ``save_pretrained``, which works
    again.

    Args:
        model: with quantised layers inside; is returned. Those that round their inputs as well
            (``ScaledLinear``) do not any more.
        dtype: of the weights; that of each layer's scales or codebook if None (``GgufLinear``:
            fp32).
        kind: of the layers to replace; others stay as they are.

    Raises ValueError if the model itself is such a layer.
    """
    if isinstance(model, kind):
        raise ValueError(
            "effllm.dequantize_: the model itself is a quantised layer; use its .weight"
        )
    found: dict[QuantizedLinear, nn.Linear] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, kind):
            if layer not in found:
                found[layer] = _dense(layer, dtype)
            model.set_submodule(name, found[layer])
    # Set by quantize_, so that nobody writes packed tensors that no config tells how to read.
    packed = any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    if hasattr(model, "hf_quantizer") and not packed:
        cast(Any, model).hf_quantizer = None
    return model


def _dense(layer: QuantizedLinear, dtype: torch.dtype | None) -> nn.Linear:
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    weight = layer.weight
    dense.weight = frozen(weight if dtype is None else weight.to(dtype))
    dense.register_parameter("bias", layer.bias)
    return dense.train(layer.training)
