"""ScaledLinear: what linear layers over 8-bit codes share, of which inputs are rounded as well."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from effllm.nn.quantized_linear import QuantizedLinear, ceil_div, frozen
from effllm.ops.fp8_gemm import dequantize_weight

ScalesPer = Literal["tensor", "channel", "group", "block"]
InputsPer = Literal["tensor", "token", "group"]

BLOCK = 128
"""Rows and columns of a block of the weight, and columns of a group of it or of inputs."""


class ScaledLinear(QuantizedLinear):
    """``y = x @ W.T + bias`` with ``W = qweight * scales``, and x rounded to such codes as well, or
    as it is.

    Stands in for ``nn.Linear`` (N = out_features, K = in_features). All tensors are plain
    parameters without gradient; gradients flow to ``x`` (LoRA) as if it had not been rounded, never
    to the weight.

    Parameters:
        qweight: codes ``[N, K]``.
        scales: float ``[1]`` of the tensor, ``[N, 1]`` per channel, ``[N, ceil(K/128)]`` per group,
            or ``[ceil(N/128), ceil(K/128)]`` per block.
        input_scale: float ``[1]`` or None: the scale of x where it is known ("static").
        bias: float ``[N]`` or None.

    Moving or casting the module never changes ``qweight``, ``scales`` or ``input_scale``: a dtype
    cast (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    quantised: ClassVar[tuple[str, ...]] = ("qweight", "scales", "input_scale")

    code_dtype: ClassVar[torch.dtype]
    """Of the weight's codes, and of those of inputs."""
    weights_per: ClassVar[tuple[ScalesPer, ...]]
    """What ``scales_per`` may be."""
    activations_per: ClassVar[tuple[InputsPer | None, ...]]
    """What ``inputs_per`` may be."""
    static_alone: ClassVar[tuple[InputsPer, ...]] = ()
    """What of it has no scale that a kernel finds at run time."""

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
        check_word("scales_per", scales_per, self.weights_per)
        check_word("inputs_per", inputs_per, self.activations_per)
        if static and inputs_per != "tensor":
            raise ValueError(f"a static scale is of inputs_per='tensor', got {inputs_per!r}")
        if inputs_per in self.static_alone and not static:
            raise ValueError(f"inputs_per={inputs_per!r} is of a static scale, got static=False")
        shape = {
            "tensor": (1,),
            "channel": (out_features, 1),
            "group": (out_features, ceil_div(in_features, BLOCK)),
            "block": (ceil_div(out_features, BLOCK), ceil_div(in_features, BLOCK)),
        }[scales_per]
        self.inputs_per = inputs_per
        self.qweight = frozen(
            torch.zeros(out_features, in_features, device=device, dtype=self.code_dtype)
        )
        self.scales = frozen(torch.ones(shape, device=device, dtype=torch.float32))
        self.input_scale: nn.Parameter | None
        scale = torch.ones(1, device=device, dtype=torch.float32) if static else None
        self.register_parameter("input_scale", None if scale is None else frozen(scale))

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Tensor,
        input_scale: Tensor | None = None,
        *,
        inputs_per: InputsPer | None,
    ) -> Self:
        """Takes the place of ``linear``, with codes that have been found for its weight.

        Args:
            linear: gives the sizes, the bias (its own tensor) and the training mode.
            codes: ``[N, K]``; scales, input_scale and inputs_per as in the class.

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
        if self.scales.shape == (self.out_features, 1):
            return "channel"
        return self.weights_per[-1]  # of groups and blocks a layer knows one

    @property
    def weight(self) -> Tensor:
        """The dequantised weight ``[N, K]`` in the dtype of the scales, computed anew each time."""
        return dequantize_weight(self.qweight, self.scales, self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16, bf16 or fp32 -> ``[..., N]`` of x's dtype."""
        operands = self._operands()
        # Products of an x that is not rounded have gradients of their own.
        if self.inputs_per is not None and torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _StraightThrough.apply(x, type(self).product, *operands)
            return out
        return type(self).product(x, *operands)

    @property
    def symmetric_inputs(self) -> bool:
        """Whether codes of x, if it is rounded, lie around 0."""
        return True

    def _operands(self) -> tuple[Any, ...]:
        """What ``product`` takes after x."""
        return self.qweight, self.scales, self.input_scale, self.bias, self.inputs_per

    @staticmethod
    @abstractmethod
    def product(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        inputs_per: InputsPer | None,
    ) -> Tensor:
        """What the layer computes."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scales_per={self.scales_per!r}, "
            f"inputs_per={self.inputs_per!r}, static={self.input_scale is not None}"
        )

    def _kind(self) -> str:
        static = "without" if self.input_scale is None else "with"
        return f"{type(self).__name__} {static} a static scale"


def check_word(name: str, word: str | None, words: tuple[str | None, ...]) -> None:
    """Raises ValueError unless it is one of them."""
    if word not in words:
        *others, last = map(repr, words)
        known = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} must be {known}, got {word!r}")


class _StraightThrough(torch.autograd.Function):
    """Backwards, rounding x counts as the identity."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: Callable[..., Tensor],
        qweight: Tensor,
        scales: Tensor,
        *others: Any,
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales)
        ctx.num_others = len(others)
        return product(x, qweight, scales, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (qweight, scales) = grads, ctx.saved_tensors
        others = [None] * (3 + ctx.num_others)
        return grad @ dequantize_weight(qweight, scales, grad.dtype), *others
