"""Lut4Linear: a linear layer with packed 4-bit codes into a codebook, as NF4 or by k-means."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.packed_linear import PackedLinear, resolve_group_size
from effllm.nn.quantized_linear import frozen
from effllm.ops.lut4_gemm import decode

CodebookPer = Literal["tensor", "row", "group"]


class Lut4Linear(PackedLinear):
    """``y = x @ W.T + bias`` with ``W[n, k] = codebook[..., code[n, k]] * scale[n, k // g]``.

    Stands in for ``nn.Linear`` (N = out_features, K = in_features, g = group_size). All tensors are
    plain parameters without gradient; gradients flow to ``x`` (LoRA), never to the weight.

    Parameters:
        qweight: int32 ``[ceil(N/64), ceil(K/64) * 512]``, the codes packed by ``int4_pack``.
        codebook: float ``[16]``, ``[N, 16]`` or ``[N, ceil(K/g), 16]``.
        scales: float ``[N, ceil(K/g)]``, or None: all 1.
        bias: float ``[N]`` or None.

    Moving or casting the module never changes ``qweight``, ``codebook`` or ``scales``: a dtype cast
    (``.half()``, ``.to(torch.bfloat16)``) touches only the bias. The product takes the codebook's
    values rounded to the dtype of x.
    """

    quantised = ("qweight", "codebook", "scales")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 64,
        codebook_per: CodebookPer = "tensor",
        scaled: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer, to be filled by ``load_state_dict``; see ``from_linear`` as well.

        ``codebook_per`` is what has a codebook each, ``scaled`` whether there are scales, ``dtype``
        that of codebook, scales and bias. Raises ValueError on sizes < 1, a wrong group size or
        another ``codebook_per``.
        """
        super().__init__(in_features, out_features, bias, group_size, device, dtype)
        leading = {
            "tensor": (),
            "row": (out_features,),
            "group": (out_features, self.num_groups),
        }
        if codebook_per not in leading:
            raise ValueError(
                f"codebook_per must be 'tensor', 'row' or 'group', got {codebook_per!r}"
            )

        def zeros(*shape: int) -> nn.Parameter:
            return frozen(torch.zeros(shape, device=device, dtype=dtype))

        self.codebook = zeros(*leading[codebook_per], 16)
        self.scales: nn.Parameter | None
        self.register_parameter("scales", zeros(out_features, self.num_groups) if scaled else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 64,
        codebook: Tensor | Literal["nf4"] = "nf4",
        scaled: bool = True,
    ) -> Lut4Linear:
        """Quantises ``linear`` by rounding to the nearest entry, on the device of its weight.

        ``codebook`` is "nf4" or a float tensor ``[16]``, ``[N, 16]`` or ``[N, ceil(K/g), 16]``,
        whose dtype is kept; NF4 and the scales take the weight's. With ``scaled`` each group is
        divided by its largest magnitude first, as NF4 wants it; without, the entries are in the
        weight's own units, as k-means leaves them. The bias keeps its own tensor.
        Raises ValueError for a wrong group size, a wrong or non-finite codebook, a meta, non-float
        or non-finite weight.
        """
        # Imported here because the quantisation package imports nn.
        from effllm.quantization.codebook import NF4, round_to_codebook

        weight = linear.weight.detach()
        group_size = resolve_group_size(group_size, linear.in_features)
        if isinstance(codebook, str):
            if codebook != "nf4":
                raise ValueError(f"codebook must be 'nf4' or a tensor, got {codebook!r}")
            # On the CPU first: a meta weight shall be refused for what it is.
            codebook = torch.tensor(NF4, device="cpu").to(weight.dtype)
        codes, scales = round_to_codebook(weight, codebook, group_size, scaled)
        # A copy: many layers may be given one tensor.
        codebook = codebook.detach().to(weight.device, copy=True)
        return cls.from_codes(linear, codes, codebook, scales, group_size=group_size)

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        codebook: Tensor,
        scales: Tensor | None = None,
        *,
        group_size: int,
    ) -> Lut4Linear:
        """Takes the place of ``linear``, with codes that a method has found for its weight.

        Args:
            linear: gives the sizes, the bias (its own tensor) and the training mode.
            codes: uint8 ``[N, K]`` in 0..15; codebook, scales and group_size as in the class.

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
        module.codebook = frozen(codebook)
        module.scales = None if scales is None else frozen(scales)
        if linear.bias is not None:
            module.bias = frozen(linear.bias.detach())
        return module.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The decoded weight ``[N, K]`` in the dtype of the codebook, computed anew each time."""
        codes = ops.int4_unpack(self.qweight, self.out_features, self.in_features)
        weight = decode(codes, self.codebook, self.scales, group_size=self.group_size)
        return weight.to(self.codebook.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16 or bf16 (fp32 too on the CPU) -> ``[..., N]`` of x's dtype."""
        codebook: Tensor = self.codebook
        if codebook.dim() == 1 and self.scales is None and self.bias is None:
            # Nothing else tells the op N.
            codebook = codebook.expand(self.out_features, 16)
        return ops.lut4_gemm(
            x, self.qweight, codebook, self.scales, self.bias, group_size=self.group_size
        )

    def extra_repr(self) -> str:
        per = ("tensor", "row", "group")[self.codebook.dim() - 1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, codebook_per={per!r}, "
            f"scaled={self.scales is not None}"
        )

    def _kind(self) -> str:
        return f"a Lut4Linear {'without' if self.scales is None else 'with'} scales"
