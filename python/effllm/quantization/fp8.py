"""FP8: weights as e4m3 codes with scales per tensor, channel or block of 128 x 128."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm import ops
from effllm.nn import Fp8Linear
from effllm.nn.scaled_linear import BLOCK, ScalesPer
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import CHANNEL, TOKEN
from effllm.quantization.round_to_nearest import check_weight
from effllm.quantization.scaled_method import TENSOR, ScaledMethod
from effllm.quantization.uniform import from_tiles, to_tiles


def quantise_weight(weight: Tensor, scales_per: ScalesPer) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` and fp32 scales of a float weight ``[N, K]``, as ``Fp8Linear`` holds them.

    Raises ValueError for another ``scales_per``, or a weight that is no float matrix with data,
    all of it finite.
    """
    check_weight(weight)
    if scales_per == "tensor":
        return ops.fp8_quantize_tensor(weight)
    if scales_per == "channel":
        codes, scales = ops.fp8_quantize(weight)
    elif scales_per == "block":
        tiles, scales = ops.fp8_quantize(to_tiles(weight, BLOCK, BLOCK))
        # Bytes are moved: torch has few functions for 8-bit floats.
        whole = from_tiles(tiles.view(torch.uint8), BLOCK, BLOCK, *weight.shape)
        codes, scales = whole.view(tiles.dtype), scales.squeeze(-1)
    else:
        raise ValueError(f"scales_per must be 'tensor', 'channel' or 'block', got {scales_per!r}")
    # A copy: of one column contiguous() keeps strides that views as bytes refuse.
    return codes, scales.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, init=False)
class Fp8Config(ScaledMethod):
    """Weights and inputs in e4m3, by rounding to nearest (arXiv:2209.05433).

    Half the bytes of 16 bits, with next to no loss, and twice the arithmetic on GPUs with fp8
    tensor cores. Blocks and groups of 128 are DeepSeek-V3's (arXiv:2412.19437).

    Attributes:
        granularity: of the weights' scales: tensor(), channel() or block(128, 128).
        inputs: of the scales of inputs, found at each call: tensor(), token() or group(128); None
            leaves inputs as they are (W8A16).
        static: one scale for all inputs, max|x| / 448 over the calibration data, instead of one
            found at each call; of inputs=tensor() alone.
    """

    name: ClassVar[str] = "fp8"
    kind = Fp8Linear
    weights_per: ClassVar = {
        TENSOR: "tensor",
        CHANNEL: "channel",
        Granularity.block(BLOCK, BLOCK): "block",
    }
    activations_per: ClassVar = {
        TENSOR: "tensor",
        TOKEN: "token",
        Granularity.group(BLOCK): "group",
        None: None,
    }
    quantise_weight = staticmethod(quantise_weight)

    @staticmethod
    def peak_scale(peaks: Tensor) -> Tensor:
        """That which the op finds, of a tensor with this maximum."""
        return ops.fp8_quantize_tensor(peaks)[1]
