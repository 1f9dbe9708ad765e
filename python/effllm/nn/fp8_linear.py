"""Fp8Linear: a linear layer with weights in e4m3, and inputs in e4m3 or as they are."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.quantized_linear import QuantizedLinear, ceil_div, frozen
from effllm.ops.fp8_gemm import dequantize_weight

ScalesPer = Literal["tensor", "channel", "block"]
InputsPer = Literal["tensor", "token", "group"]

BLOCK = 128
"""Rows and columns of a block of the weight, and columns of a group of inputs."""


class Fp8Linear(QuantizedLinear):
    """``y = x @ W.T + bias`` with ``W = qweight * scales``, and x rounded to e4m3 as well.

    Stands in for ``nn.Linear`` (N = out_features, K = in_features). x gets scales of its own at
    each call, per tensor, per token, or per token and group of 128 channels; or one that is known
    beforehand; or stays as it is (W8A16). All tensors are plain parameters without gradient;
    gradients flow to ``x`` (LoRA) as if it had not been rounded, never to the weight.

    Parameters:
        qweight: float8_e4m3fn ``[N, K]``.
        scales: float ``[1]`` of the tensor, ``[N, 1]`` per channel, or
            ``[ceil(N/128), ceil(K/128)]`` per block.
        input_scale: float ``[1]`` or None: the scale of x where it is known ("static").
        bias: float ``[N]`` or None.

    Moving or casting the module never changes ``qweight``, ``scales`` or ``input_scale``: a dtype
    cast (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    quantised = ("qweight", "scales", "input_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scales_per: ScalesPer = "channel",
        inputs_per: InputsPer | None = "token",
        static: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer, to be filled by ``load_state_dict``; see ``from_linear`` as well.

        ``scales_per`` is what of the weight has a scale each, ``inputs_per`` what of x, None for x
        as it is; with ``static`` there is an ``input_scale``, of the tensor. ``dtype`` is that of
        the bias, scales are fp32. Raises ValueError on sizes < 1 or other words.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        shapes = {
            "tensor": (1,),
            "channel": (out_features, 1),
            "block": (ceil_div(out_features, BLOCK), ceil_div(in_features, BLOCK)),
        }
        if scales_per not in shapes:
            raise ValueError(
                f"scales_per must be 'tensor', 'channel' or 'block', got {scales_per!r}"
            )
        _check_inputs_per(inputs_per, static)
        self.inputs_per = inputs_per
        self.qweight = frozen(
            torch.zeros(out_features, in_features, device=device, dtype=torch.float8_e4m3fn)
        )
        self.scales = frozen(torch.ones(shapes[scales_per], device=device, dtype=torch.float32))
        self.input_scale: nn.Parameter | None
        scale = torch.ones(1, device=device, dtype=torch.float32) if static else None
        self.register_parameter("input_scale", None if scale is None else frozen(scale))

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

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Tensor,
        input_scale: Tensor | None = None,
        *,
        inputs_per: InputsPer | None,
    ) -> Fp8Linear:
        """Takes the place of ``linear``, with codes that have been found for its weight.

        Args:
            linear: gives the sizes, the bias (its own tensor) and the training mode.
            codes: float8_e4m3fn ``[N, K]``; scales, input_scale and inputs_per as in the class.

        Raises ValueError for another ``inputs_per``.
        """
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            inputs_per=inputs_per,
            static=input_scale is not None,
            device="meta",
        )
        module.qweight = frozen(codes)
        module.scales = frozen(scales)
        module.input_scale = None if input_scale is None else frozen(input_scale)
        if linear.bias is not None:
            module.bias = frozen(linear.bias.detach())
        return module.train(linear.training)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "scales_per": self.scales_per,
            "inputs_per": self.inputs_per,
            "static": self.input_scale is not None,
        }

    @property
    def scales_per(self) -> ScalesPer:
        """What of the weight has a scale each, by their shape."""
        if self.scales.numel() == 1:
            return "tensor"
        return "channel" if self.scales.shape == (self.out_features, 1) else "block"

    @property
    def weight(self) -> Tensor:
        """The dequantised weight ``[N, K]`` in the dtype of the scales, computed anew each time."""
        return dequantize_weight(self.qweight, self.scales, self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16 or bf16 (fp32 too, but for W8A16 on a GPU) -> ``[..., N]`` of x's
        dtype."""
        if self.inputs_per is None:
            return ops.fp8_weight_gemm(x, self.qweight, self.scales, self.bias)
        tensors = (self.qweight, self.scales, self.input_scale, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _RoundedProduct.apply(x, *tensors, self.inputs_per)
            return out
        return _rounded_product(x, *tensors, self.inputs_per)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: storages of 8-bit floats are nothing that pickle knows."""
        parameters = {**self._parameters, "qweight": frozen(self.qweight.data.view(torch.uint8))}
        return self.__dict__ | {"_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.qweight = frozen(self.qweight.data.view(torch.float8_e4m3fn))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scales_per={self.scales_per!r}, "
            f"inputs_per={self.inputs_per!r}, static={self.input_scale is not None}"
        )

    def _kind(self) -> str:
        return f"an Fp8Linear {'without' if self.input_scale is None else 'with'} a static scale"


def _check_inputs_per(inputs_per: InputsPer | None, static: bool) -> None:
    if inputs_per is not None and inputs_per not in get_args(InputsPer):
        raise ValueError(
            f"inputs_per must be 'tensor', 'token', 'group' or None, got {inputs_per!r}"
        )
    if static and inputs_per != "tensor":
        raise ValueError(f"a static scale is of inputs_per='tensor', got {inputs_per!r}")


def _rounded_product(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    inputs_per: InputsPer,
) -> Tensor:
    if inputs_per == "tensor":
        codes, x_scales = ops.fp8_quantize_tensor(x, input_scale)
    else:
        codes, x_scales = ops.fp8_quantize(x, group_size=BLOCK if inputs_per == "group" else None)
    return ops.fp8_gemm(codes, x_scales, qweight, scales, bias, out_dtype=x.dtype)


class _RoundedProduct(torch.autograd.Function):
    """Backwards, rounding x counts as the identity (a straight-through estimate)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, *others: Any) -> Tensor:
        ctx.save_for_backward(qweight, scales)
        return _rounded_product(x, qweight, scales, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (qweight, scales) = grads, ctx.saved_tensors
        return grad @ dequantize_weight(qweight, scales, grad.dtype), *[None] * 5
