"""Fp8Linear: a linear layer with weights in e4m3, and inputs in e4m3 or as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.quantized_linear import frozen
from effllm.nn.scaled_linear import BLOCK, InputsPer, ScaledLinear, ScalesPer


class Fp8Linear(ScaledLinear):
    """``y = x @ W.T + bias`` with ``W = qweight * scales`` in e4m3, and x rounded to e4m3 as well.

    x gets scales of its own at each call, per tensor, per token, or per token and group of 128
    channels; or one that is known beforehand; or stays as it is (W8A16), fp16 or bf16 on a GPU. See
    ``ScaledLinear``.
    """

    code_dtype = torch.float8_e4m3fn
    weights_per = ("tensor", "channel", "block")
    activations_per = ("tensor", "token", "group", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scales_per: ScalesPer = "channel",
        inputs_per: InputsPer | None = "token",
        input_scale: Tensor | None = None,
    ) -> Fp8Linear:
        """Quantises ``linear`` by rounding to nearest, on the device of its weight.

        ``input_scale`` ``[1]`` makes it static: max|x| / 448 of what is expected. The bias keeps
        its own tensor. Raises ValueError for other words, a meta, non-float or non-finite weight.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.fp8 import quantise_weight

        codes, scales = quantise_weight(linear.weight.detach(), scales_per)
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
        if inputs_per is None:
            return ops.fp8_weight_gemm(x, qweight, scales, bias)
        if inputs_per == "tensor":
            codes, x_scales = ops.fp8_quantize_tensor(x, input_scale)
        else:
            codes, x_scales = ops.fp8_quantize(
                x, group_size=BLOCK if inputs_per == "group" else None
            )
        return ops.fp8_gemm(codes, x_scales, qweight, scales, bias, out_dtype=x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: storages of 8-bit floats are nothing that pickle knows."""
        parameters = {**self._parameters, "qweight": frozen(self.qweight.data.view(torch.uint8))}
        return self.__dict__ | {"_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.qweight = frozen(self.qweight.data.view(torch.float8_e4m3fn))
