"""Int4Linear: a linear layer with packed 4-bit weights, one scale per group of input channels."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.packed_linear import PackedLinear, resolve_group_size
from effllm.nn.quantized_linear import frozen
from effllm.ops.int4_gemm import dequantize


class Int4Linear(PackedLinear):
    """``y = x @ W.T + bias`` with ``W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]``.

    Stands in for ``nn.Linear`` (N = out_features, K = in_features, g = group_size). All tensors are
    plain parameters without gradient; gradients flow to ``x`` (LoRA), never to the weight.

    Parameters:
        qweight: int32 ``[ceil(N/64), ceil(K/64) * 512]``, the codes packed by ``int4_pack``.
        scales: float ``[N, ceil(K/g)]``; the last group may be short.
        zeros: uint8 ``[N, ceil(K/g)]``, or None: every zero point is 8 (symmetric).
        perm: int32 ``[K]`` or None: column k of the codes belongs to input channel ``perm[k]``.
            Checkpoints whose groups are not consecutive channels (GPTQ's act-order) come so.
        bias: float ``[N]`` or None.

    Moving or casting the module never changes ``qweight``, ``scales``, ``zeros`` or ``perm``: a
    dtype cast (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    quantised: ClassVar[tuple[str, ...]] = ("qweight", "scales", "zeros", "perm")
    _name: ClassVar[str] = "an Int4Linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 64,
        symmetric: bool = True,
        permuted: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer, to be filled by ``load_state_dict``; see ``from_linear`` as well.

        ``dtype`` is that of scales and bias; with ``permuted`` there is a ``perm``.
        Raises ValueError on sizes < 1 or a wrong group size.
        """
        super().__init__(in_features, out_features, bias, group_size, device, dtype)
        shape = (out_features, self.num_groups)
        self.scales = frozen(torch.zeros(shape, device=device, dtype=dtype))
        self.zeros: nn.Parameter | None
        zeros = None if symmetric else torch.zeros(shape, device=device, dtype=torch.uint8)
        self.register_parameter("zeros", None if zeros is None else frozen(zeros))
        self.perm: nn.Parameter | None
        perm = torch.arange(in_features, device=device, dtype=torch.int32) if permuted else None
        self.register_parameter("perm", None if perm is None else frozen(perm))

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64, symmetric: bool = True) -> Self:
        """Quantises ``linear`` by rounding to nearest, on the device of its weight.

        The scales take the weight's dtype; the bias keeps its own tensor.
        Raises ValueError for a wrong group size, a meta, non-float or non-finite weight.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.round_to_nearest import round_to_nearest

        weight = linear.weight.detach()
        group_size = resolve_group_size(group_size, linear.in_features)
        codes, scales, zeros = round_to_nearest(weight, group_size, symmetric)
        return cls.from_codes(linear, codes, scales, zeros, group_size=group_size)

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
    ) -> Self:
        """Takes the place of ``linear``, with codes that a method has found for its weight.

        Args:
            linear: gives the sizes, the bias (its own tensor) and the training mode.
            codes: uint8 ``[N, K]`` in 0..15; scales, zeros, perm and group_size as in the class.

        Raises ValueError for a wrong group size, RuntimeError for codes that cannot be packed.
        """
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            group_size=group_size,
            device="meta",
        )
        module.qweight = frozen(ops.int4_pack(codes))
        module.scales = frozen(scales)
        module.zeros = None if zeros is None else frozen(zeros)
        module.perm = None if perm is None else frozen(perm)
        if linear.bias is not None:
            module.bias = frozen(linear.bias.detach())
        return module.train(linear.training)

    @property
    def group_scales(self) -> Tensor:
        """``[N, ceil(K/g)]``, what a code less its zero point is multiplied by."""
        return self.scales

    @property
    def weight(self) -> Tensor:
        """The dequantised weight ``[N, K]`` in the dtype of the scales, computed anew each time."""
        weight = dequantize(
            self.qweight, self.group_scales, self.zeros, self.in_features, self.group_size
        )
        if self.perm is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.perm.long(), weight)
        return weight.to(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16 or bf16 (fp32 too on the CPU) -> ``[..., N]`` of x's dtype."""
        return ops.int4_gemm(
            x,
            self.qweight,
            self.scales,
            self.zeros,
            self.bias,
            self.perm,
            group_size=self.group_size,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, "
            f"symmetric={self.zeros is None}{'' if self.perm is None else ', permuted=True'}"
        )

    def _kind(self) -> str:
        permuted = "" if self.perm is None else " and permuted inputs"
        return f"{self._name} with {'no ' if self.zeros is None else ''}zero points{permuted}"
