"""W8A8Linear: a linear layer with weights and inputs in int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.scaled_linear import InputsPer, ScaledLinear, ScalesPer, check_word


class W8A8Linear(ScaledLinear):
    """``y = x @ W.T + bias`` with ``W = qweight * scales`` in int8, and x rounded to int8 as well.

    Scales of the weight are per tensor or channel. x gets a scale per token at each call
    (``inputs_per="token"``), or all of it one that is known beforehand (``"tensor"``, static). Made
    of the same bits it computes the same bits on every device. See ``ScaledLinear``.
    """

    code_dtype = torch.int8
    weights_per = ("tensor", "channel")
    activations_per = ("tensor", "token")
    static_alone = ("tensor",)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scales_per: ScalesPer = "channel",
        input_scale: Tensor | None = None,
    ) -> W8A8Linear:
        """Quantises ``linear`` by rounding to nearest, on the device of its weight.

        ``input_scale`` ``[1]`` makes it static: max|x| / 127 of what is expected. The bias keeps
        its own tensor. Raises ValueError for other words, a meta, non-float or non-finite weight.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.int8 import quantise_weight

        check_word("scales_per", scales_per, cls.weights_per)
        codes, scales = quantise_weight(linear.weight.detach(), scales_per)
        inputs_per: InputsPer = "token" if input_scale is None else "tensor"
        return cls.from_codes(linear, codes, scales, input_scale, inputs_per=inputs_per)

    @staticmethod
    def product(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        inputs_per: InputsPer | None,
    ) -> Tensor:
        codes, x_scales = ops.int8_quantize(x, input_scale)
        return ops.int8_gemm(codes, x_scales, qweight, scales, bias, out_dtype=x.dtype)
