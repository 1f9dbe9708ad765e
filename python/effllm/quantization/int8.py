"""W8A8: weights and inputs as int8 codes, as they are or after SmoothQuant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from effllm import ops
from effllm.nn import W8A8Linear
from effllm.nn.scaled_linear import BLOCK, InputsPer, ScalesPer
from effllm.quantization.folding import Fold
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import CHANNEL, TOKEN, ScaledCodes
from effllm.quantization.round_to_nearest import check_weight
from effllm.quantization.scaled_method import TENSOR, ScaledMethod
from effllm.quantization.smoothing import check_alpha, find_alpha, smoothing_scales
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.uniform import from_tiles, to_tiles


def quantise_weight(weight: Tensor, scales_per: ScalesPer) -> tuple[Tensor, Tensor]:
    """int8 codes ``[N, K]`` and fp32 scales of a float weight ``[N, K]``, as ``W8A8Linear`` and
    ``Int8Linear`` hold them.

    Raises ValueError for another ``scales_per``, or a weight that is no float matrix with data,
    all of it finite.
    """
    check_weight(weight)
    if scales_per == "group":
        codes, scales = ops.int8_quantize(to_tiles(weight, 1, BLOCK))
        return from_tiles(codes, 1, BLOCK, *weight.shape), _dense(scales.squeeze(-1))
    if scales_per not in ("tensor", "channel"):
        raise ValueError(f"scales_per must be 'tensor', 'channel' or 'group', got {scales_per!r}")
    rows = weight.reshape(1, -1) if scales_per == "tensor" else weight
    codes, scales = ops.int8_quantize(rows)
    shape = (1,) if scales_per == "tensor" else scales.shape
    return codes.view(weight.shape), _dense(scales).view(shape)


def _dense(scales: Tensor) -> Tensor:
    """A copy: of one element contiguous() keeps strides that views as bytes refuse."""
    return scales.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, init=False)
class Int8Config(ScaledMethod):
    """W8A8: weights and inputs in int8, by rounding to nearest.

    Half the bytes of 16 bits, and twice the arithmetic on GPUs with int8 tensor cores, which are
    all since 2018. Channels of inputs that are far larger than others cost dearly: see
    ``SmoothQuantConfig``.

    Attributes:
        granularity: of the weights' scales: tensor() or channel().
        inputs: of the scales of inputs: token(), found at each call, or with ``static`` tensor().
        static: one scale for all inputs, max|x| / 127 over the calibration data. A layer whose
            inputs the calibration has not reached gets one per token.
        symmetric_inputs: codes of inputs lie around 0. Otherwise tokens have zero points as well,
            which half the steps of those that lie on one side of 0, as after a ReLU or GELU.
    """

    name: ClassVar[str] = "int8"
    kind = W8A8Linear
    weights_per: ClassVar = {TENSOR: "tensor", CHANNEL: "channel"}
    activations_per: ClassVar = {TENSOR: "tensor", TOKEN: "token"}
    quantise_weight = staticmethod(quantise_weight)
    symmetric_inputs: bool = True

    def __init__(
        self,
        granularity: Granularity = CHANNEL,
        inputs: Granularity | None = TOKEN,
        static: bool = False,
        *,
        symmetric_inputs: bool = True,
    ) -> None:
        """Raises ValueError for what no kernel has."""
        super().__init__(granularity, inputs, static)
        object.__setattr__(self, "symmetric_inputs", symmetric_inputs)
        if not symmetric_inputs and inputs != TOKEN:
            raise ValueError(
                f"{type(self).__name__}: symmetric_inputs=False is of inputs=token(), got {inputs}"
            )
        if inputs == TENSOR and not static:
            raise ValueError(
                f"{type(self).__name__}: inputs=tensor() is of static=True: no kernel finds one "
                "scale for all inputs at run time"
            )

    @staticmethod
    def peak_scale(peaks: Tensor) -> Tensor:
        """That which the op finds, of a row with this maximum."""
        return _dense(ops.int8_quantize(peaks)[1])

    def inputs_per(self, input_scale: Tensor | None) -> InputsPer | None:
        """See ``ScaledMethod.inputs_per``."""
        return "token" if input_scale is None else "tensor"

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> ScaledCodes:
        """See ``ScaledMethod.quantise``."""
        codes = super().quantise(weight, inputs)
        return replace(codes, symmetric_inputs=self.symmetric_inputs)


@dataclass(frozen=True, init=False)
class SmoothQuantConfig(Int8Config):
    """W8A8 of a model whose outliers have been moved into the weights (SmoothQuant,
    arXiv:2211.10438).

    Input channels are divided by a scale each, ``smooth_``'s, where a norm or layer before takes
    it over exactly; needs calibration.

    Attributes:
        granularity, inputs, static, symmetric_inputs: as in ``Int8Config``.
        alpha: 0 leaves outliers to activations, 1 to weights; None takes, for each input, the
            twentieth with the least error that 8 bits of both are expected to make.
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float | None = None

    def __init__(
        self,
        granularity: Granularity = CHANNEL,
        inputs: Granularity | None = TOKEN,
        static: bool = False,
        alpha: float | None = None,
        *,
        symmetric_inputs: bool = True,
    ) -> None:
        """Raises ValueError for what no kernel has, or an alpha outside of 0..1."""
        super().__init__(granularity, inputs, static, symmetric_inputs=symmetric_inputs)
        check_alpha("SmoothQuantConfig", alpha)
        object.__setattr__(self, "alpha", alpha)

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def scales_inputs(self) -> bool:
        """Always."""
        return True

    def input_scales(self, weights: list[Tensor], inputs: InputStatistics, fold: Fold) -> Tensor:
        """See ``Method.input_scales``; of all layers that get the input, quantised or not."""
        alpha = find_alpha(fold, inputs) if self.alpha is None else self.alpha
        return smoothing_scales(fold, inputs, alpha)
