"""FP8: weights as e4m3 codes with scales per tensor, channel or block of 128 x 128."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm import ops
from effllm.nn.fp8_linear import BLOCK, InputsPer, ScalesPer
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import CHANNEL, TOKEN, Fp8Codes, Method
from effllm.quantization.round_to_nearest import check_weight
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.uniform import from_tiles, to_tiles

_WEIGHTS: dict[Granularity, ScalesPer] = {
    Granularity.tensor(): "tensor",
    CHANNEL: "channel",
    Granularity.block(BLOCK, BLOCK): "block",
}
_INPUTS: dict[Granularity, InputsPer] = {
    Granularity.tensor(): "tensor",
    TOKEN: "token",
    Granularity.group(BLOCK): "group",
}


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
class Fp8Config(Method):
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
    inputs: Granularity | None = TOKEN
    static: bool = False

    def __init__(
        self,
        granularity: Granularity = CHANNEL,
        inputs: Granularity | None = TOKEN,
        static: bool = False,
    ) -> None:
        """Raises ValueError for a granularity that no kernel has."""
        for name, value in (
            ("bits", 8),
            ("granularity", granularity),
            ("inputs", inputs),
            ("static", static),
        ):
            object.__setattr__(self, name, value)
        if granularity not in _WEIGHTS:
            raise ValueError(
                "Fp8Config: granularity must be tensor(), channel() or block(128, 128), got "
                f"{granularity}"
            )
        if inputs is not None and inputs not in _INPUTS:
            raise ValueError(
                f"Fp8Config: inputs must be tensor(), token(), group(128) or None, got {inputs}"
            )
        if static and inputs != Granularity.tensor():
            raise ValueError(f"Fp8Config: static is of inputs=tensor(), got {inputs}")

    @property
    def needs_calibration(self) -> bool:
        """With ``static``."""
        return self.static

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> Fp8Codes:
        """See ``Method.quantise``; scales are fp32 whatever the weight is. A layer whose inputs the
        calibration has not reached gets its scale at each call."""
        codes, scales = quantise_weight(weight, _WEIGHTS[self.granularity])
        input_scale = None
        if self.static and inputs is not None and inputs.tokens:
            # The scale that the op finds, of a tensor with this maximum.
            input_scale = ops.fp8_quantize_tensor(inputs.peak.float())[1]
        inputs_per = None if self.inputs is None else _INPUTS[self.inputs]
        return Fp8Codes(codes, scales, inputs_per, input_scale)
