"""W4A8Linear: a linear layer with packed 4-bit weights, and inputs in int8."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.linear import Int4Linear
from effllm.nn.packed_linear import resolve_group_size
from effllm.nn.quantized_linear import frozen
from effllm.ops.int4_gemm import dequantize
from effllm.ops.w4a8_gemm import MAX_MULTIPLIER


class W4A8Linear(Int4Linear):
    """``Int4Linear`` whose x is rounded to int8 as well, each token by a scale of its own, max|x| /
    127, that is found at each call.

    Parameters and their shapes are those of ``Int4Linear``, and so is what ``effllm.save`` writes:
    a file says nothing of the inputs, and comes back as an ``Int4Linear``. Zero points must be at
    most 128. Gradients flow to ``x`` (LoRA) as if it had not been rounded, never to the weight.

    With ``two_level``, scales are products, ``scale[n, k // g] = multiplier[n, k // g] * step[n]``:
    a code less 8 times its multiplier is an int8, so that sums are exact over all of K, and many
    tokens take the time of one scale per row. There are no zero points then, and:

    Parameters:
        scales: float ``[N, 1]``, the steps.
        multipliers: uint8 ``[N, ceil(K/g)]`` of 0..15, or None: scales of one level.
    """

    quantised = (*Int4Linear.quantised, "multipliers")
    _name = "a W4A8Linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 64,
        symmetric: bool = True,
        permuted: bool = False,
        two_level: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As ``Int4Linear``; raises ValueError for scales of two levels with zero points too."""
        if two_level and not symmetric:
            raise ValueError("W4A8Linear: two_level needs symmetric=True, got False")
        super().__init__(
            in_features,
            out_features,
            bias,
            group_size=group_size,
            symmetric=symmetric,
            permuted=permuted,
            device=device,
            dtype=dtype,
        )
        self.multipliers: nn.Parameter | None
        multipliers = None
        if two_level:
            self.scales = frozen(torch.zeros((out_features, 1), device=device, dtype=dtype))
            shape = (out_features, self.num_groups)
            multipliers = frozen(torch.zeros(shape, device=device, dtype=torch.uint8))
        self.register_parameter("multipliers", multipliers)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 64,
        symmetric: bool = True,
        two_level: bool = False,
    ) -> Self:
        """As ``Int4Linear``; raises ValueError for scales of two levels with zero points too."""
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.round_to_nearest import round_to_nearest

        group_size = resolve_group_size(group_size, linear.in_features)
        codes, scales, zeros = round_to_nearest(
            linear.weight.detach(), group_size, symmetric, two_level=two_level
        )
        return cls.from_codes(
            linear, codes, scales, zeros, group_size=group_size, two_level=two_level
        )

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        *,
        group_size: int,
        two_level: bool = False,
    ) -> Self:
        """As ``Int4Linear``: ``scales`` are ``[N, ceil(K/g)]``, also of two levels.

        Raises ValueError, too, for ``two_level`` with zero points, or with scales that are not 1 to
        15 times one number of their row.
        """
        module = super().from_codes(linear, codes, scales, zeros, perm, group_size=group_size)
        if two_level:
            if zeros is not None:
                raise ValueError("W4A8Linear: two_level has no zero points, got zeros")
            steps, multipliers = split_scales(scales)
            module.scales, module.multipliers = frozen(steps), frozen(multipliers)
        return module

    @property
    def group_scales(self) -> Tensor:
        """See ``Int4Linear``; of two levels in fp32."""
        return _group_scales(self.scales, self.multipliers)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16, bf16 or fp32 -> ``[..., N]`` of x's dtype."""
        if self.perm is not None:
            x = x.index_select(-1, self.perm)
        tensors = (self.qweight, self.scales, self.zeros, self.bias, self.multipliers)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _RoundedProduct.apply(x, *tensors, self.group_size)
            return out
        return _rounded_product(x, *tensors, self.group_size)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.multipliers is None else ", two_level=True")

    def _kind(self) -> str:
        return super()._kind() + ("" if self.multipliers is None else " and scales of two levels")


def split_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales ``[N, G]`` of two levels as steps ``[N, 1]`` of their dtype, and multipliers uint8
    ``[N, G]`` of 1..15: their products are the scales, to the bit.

    Raises ValueError for scales that are not all 1 to 15 times one number of their row.
    """
    values = scales.float()
    largest = values.amax(-1, keepdim=True)
    steps = torch.zeros_like(largest)
    # From the largest step that may be: multiples of a number of few bits have no finer one first.
    for multiplier in range(1, MAX_MULTIPLIER + 1):
        # By a tensor: on a GPU torch multiplies by the reciprocal of a number, which rounds twice.
        tried = (largest / torch.full_like(largest, multiplier)).to(scales.dtype).float()
        counts = torch.round(values / tried)
        fits = ((counts >= 1) & (counts * tried == values)).all(-1, keepdim=True)
        steps = torch.where((steps == 0) & fits, tried, steps)
    wrong = ~(steps > 0).flatten()
    if bool(wrong.any()):
        raise ValueError(
            f"scales of two levels must be 1 to {MAX_MULTIPLIER} times one number in each row, got "
            f"others in row {int(wrong.nonzero()[0])}"
        )
    return steps.to(scales.dtype), torch.round(values / steps).to(torch.uint8)


def _group_scales(scales: Tensor, multipliers: Tensor | None) -> Tensor:
    return scales if multipliers is None else multipliers * scales.float()


def _rounded_product(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    multipliers: Tensor | None,
    group_size: int,
) -> Tensor:
    codes, x_scales = ops.int8_quantize(x)
    return ops.w4a8_gemm(
        codes,
        x_scales,
        qweight,
        scales,
        zeros,
        bias,
        multipliers,
        group_size=group_size,
        out_dtype=x.dtype,
    )


class _RoundedProduct(torch.autograd.Function):
    """Backwards, rounding x counts as the identity (a straight-through estimate)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, *others: Any
    ) -> Tensor:
        _, multipliers, group_size = others
        ctx.save_for_backward(qweight, scales, zeros, multipliers)
        ctx.k, ctx.group_size = x.shape[-1], group_size
        return _rounded_product(x, qweight, scales, zeros, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (qweight, scales, zeros, multipliers) = grads, ctx.saved_tensors
        scales = _group_scales(scales, multipliers)
        weight = dequantize(qweight, scales, zeros, ctx.k, ctx.group_size)
        return grad @ weight.to(grad.dtype), *[None] * 6
