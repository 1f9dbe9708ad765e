"""Int8Linear: a linear layer with weights in int8, inputs as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.scaled_linear import InputsPer, ScaledLinear, ScalesPer
from effllm.ops.int8_weight_gemm import dequantize_groups


class Int8Linear(ScaledLinear):
    """``y = x @ W.T + bias`` with ``W = qweight * scales`` in int8, x fp16 or bf16 (W8A16).

    Scales are per tensor, channel, or channel and group of 128 inputs, of any float dtype. Inputs
    of fp32 are for the CPU. See ``ScaledLinear``.
    """

    code_dtype = torch.int8
    weights_per = ("tensor", "channel", "group")
    activations_per = (None,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scales_per: ScalesPer = "channel",
        inputs_per: InputsPer | None = None,
        static: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As ``ScaledLinear``, with inputs that are not rounded."""
        super().__init__(
            in_features,
            out_features,
            bias,
            scales_per=scales_per,
            inputs_per=inputs_per,
            static=static,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, scales_per: ScalesPer = "channel") -> Int8Linear:
        """Quantises ``linear`` by rounding to nearest, on the device of its weight.

        The bias keeps its own tensor. Raises ValueError for other words, a meta, non-float or
        non-finite weight.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.int8 import quantise_weight

        codes, scales = quantise_weight(linear.weight.detach(), scales_per)
        return cls.from_codes(linear, codes, scales, inputs_per=None)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight ``[N, K]`` in the dtype of the scales, computed anew each time."""
        return dequantize_groups(self.qweight, self.scales, self.scales.dtype)

    @staticmethod
    def product(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        inputs_per: InputsPer | None,
    ) -> Tensor:
        return ops.int8_weight_gemm(x, qweight, scales, bias)
