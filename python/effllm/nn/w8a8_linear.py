"""W8A8Linear: a linear layer with weights and inputs in int8."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.quantized_linear import frozen
from effllm.nn.scaled_linear import InputsPer, ScaledLinear, ScalesPer, check_word


class W8A8Linear(ScaledLinear):
    """``y = x @ W.T + bias`` with ``W = qweight * scales`` in int8, and x rounded to int8 as well.

    Scales of the weight are per tensor or channel. x gets a scale per token at each call
    (``inputs_per="token"``), or all of it one that is known beforehand (``"tensor"``, static). Made
    of the same bits it computes the same bits on every device. See ``ScaledLinear``.

    Without ``symmetric_inputs`` tokens get zero points as well, which half the steps of those that
    lie on one side of 0. Their correction takes the sums of the weight's rows:

    Parameters:
        weight_sums: int32 ``[N]``, ``qweight.sum(1)``, or None: symmetric inputs.
    """

    quantised = (*ScaledLinear.quantised, "weight_sums")

    code_dtype = torch.int8
    weights_per = ("tensor", "channel")
    activations_per = ("tensor", "token")
    static_alone = ("tensor",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scales_per: ScalesPer = "channel",
        inputs_per: InputsPer | None = "token",
        static: bool = False,
        symmetric_inputs: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As ``ScaledLinear``; raises ValueError for zero points of a static scale."""
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
        self.weight_sums: nn.Parameter | None
        self.register_parameter("weight_sums", None)
        if not symmetric_inputs:
            self._set_sums(torch.zeros(out_features, device=device, dtype=torch.int32))

    def _set_sums(self, sums: Tensor) -> None:
        if self.inputs_per != "token":
            raise ValueError(
                f"symmetric_inputs=False is of inputs_per='token', got {self.inputs_per!r}"
            )
        self.weight_sums = frozen(sums)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scales_per: ScalesPer = "channel",
        input_scale: Tensor | None = None,
        symmetric_inputs: bool = True,
    ) -> Self:
        """Quantises ``linear`` by rounding to nearest, on the device of its weight.

        ``input_scale`` ``[1]`` makes it static: max|x| / 127 of what is expected. The bias keeps
        its own tensor. Raises ValueError for other words, zero points of a static scale, a meta,
        non-float or non-finite weight.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.int8 import quantise_weight

        check_word("scales_per", scales_per, cls.weights_per)
        codes, scales = quantise_weight(linear.weight.detach(), scales_per)
        inputs_per: InputsPer = "token" if input_scale is None else "tensor"
        return cls.from_codes(
            linear,
            codes,
            scales,
            input_scale,
            inputs_per=inputs_per,
            symmetric_inputs=symmetric_inputs,
        )

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Tensor,
        input_scale: Tensor | None = None,
        *,
        inputs_per: InputsPer | None,
        symmetric_inputs: bool = True,
    ) -> Self:
        """As ``ScaledLinear``; raises ValueError for zero points of a static scale."""
        module = super().from_codes(linear, codes, scales, input_scale, inputs_per=inputs_per)
        if not symmetric_inputs:
            module._set_sums(codes.sum(1, dtype=torch.int32))
        return module

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"symmetric_inputs": self.symmetric_inputs}

    @property
    def symmetric_inputs(self) -> bool:
        return self.weight_sums is None

    def _operands(self) -> tuple[Any, ...]:
        return *super()._operands(), self.weight_sums

    @staticmethod
    def product(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        inputs_per: InputsPer | None,
        weight_sums: Tensor | None = None,
    ) -> Tensor:
        if weight_sums is not None:
            codes, x_scales, x_zeros = ops.int8_quantize_asymmetric(x)
            return ops.int8_gemm(
                codes, x_scales, qweight, scales, bias, x_zeros, weight_sums, out_dtype=x.dtype
            )
        codes, x_scales = ops.int8_quantize(x, input_scale)
        return ops.int8_gemm(codes, x_scales, qweight, scales, bias, out_dtype=x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.symmetric_inputs else ", symmetric_inputs=False")

    def _kind(self) -> str:
        return super()._kind() + ("" if self.symmetric_inputs else ", with zero points of inputs,")
