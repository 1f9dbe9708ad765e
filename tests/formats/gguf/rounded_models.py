"""Dense models with the values that a GGUF file has of them."""

from __future__ import annotations

from typing import Any

import torch

from effllm.formats.gguf import TensorType, dequantize, quantize


def rounded(model: Any, kind: TensorType) -> Any:
    """The same model with every matrix rounded as the file stores it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                raw = quantize(parameter, kind)
                parameter.copy_(dequantize(raw, kind, tuple(parameter.shape)))
    return model
