"""GgufLinear: a linear layer over blocks of GGUF, on the int4 kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from effllm import ops
from effllm.nn.packed_linear import packed_shape
from effllm.nn.quantized_linear import QuantizedLinear, frozen

BlockType = Literal["q8_0", "q4_k", "q6_k"]
"""Types of GGUF that the layer holds, as ggml calls them."""


@dataclass(frozen=True)
class BlockLayout:
    """A type of GGUF.

    Attributes:
        bits: of a code.
        values: of a block.
        header_bytes: of a block beside its codes.
        run: values that share a scale.
        planes: 4-bit codes that a value is made of.
        middle: the code of 0 before minima are taken away.
    """

    bits: int
    values: int
    header_bytes: int
    run: int
    planes: int
    middle: int


LAYOUTS: dict[BlockType, BlockLayout] = {
    "q8_0": BlockLayout(8, 32, 2, 32, 2, 128),
    "q4_k": BlockLayout(4, 256, 16, 32, 1, 0),
    "q6_k": BlockLayout(6, 256, 18, 16, 2, 32),
}


_SCALES = ("d", "scales", "dmin", "minima")


class GgufLinear(QuantizedLinear):
    """``y = x @ W.T + bias``, W in blocks of Q8_0, Q4_K or Q6_K, to the bit what GGUF files hold.

    Stands in for ``nn.Linear`` (N = out_features, K = in_features, a multiple of the block: 32,
    or 256 for K-quants). ``int4_gemm`` multiplies, and in exact arithmetic would give just
    ``x @ W.T``:

    - Q8_0, in two planes: a code is ``16 h + l``, so 32 columns are a group of h with the scale
      ``16 d``, and one of l with the scale d, of the same inputs.
    - Q6_K, whose scales are of 16 columns: a code is ``8 h + l``, and a group holds 16 columns of h
      and the same of l, whose inputs are divided by 8.
    - Q4_K: 8 is the zero point, and what the minimum of 32 columns is beside 8 steps is multiplied
      by the sum of these inputs.

    So Q8_0 and Q6_K take twice the arithmetic of 4-bit layers; in memory Q8_0 has 8.5 bits per
    weight, Q6_K 8.6 and Q4_K 4.6. All tensors are plain parameters without gradient; gradients flow
    to ``x`` (LoRA), never to the weight.

    Parameters:
        qweight: int32 ``[ceil(N/64), ceil(P/64) * 512]``, the planes of the codes packed by
            ``int4_pack``; P = K for Q4_K, else 2 K.
        d: fp16 ``[N, K/32]`` (Q8_0) or ``[N, K/256]``, scales, or scales of scales.
        scales: None (Q8_0), uint8 ``[N, K/32]`` in 0..63 (Q4_K) or int8 ``[N, K/16]`` (Q6_K).
        dmin, minima: fp16 ``[N, K/256]`` and uint8 ``[N, K/32]`` in 0..63 (Q4_K), else None.
        bias: float ``[N]`` or None.

    A dtype cast (``.half()``, ``.to(torch.bfloat16)``) touches only the bias.
    """

    quantised = ("qweight", *_SCALES)

    d: nn.Parameter
    scales: nn.Parameter
    dmin: nn.Parameter
    minima: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tensor_type: BlockType,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer, to be filled by ``load_state_dict``; see ``from_codes`` as well.

        ``dtype`` is that of the bias. Raises ValueError on sizes < 1, another type, or input
        channels that are no multiple of its block.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        if tensor_type not in get_args(BlockType):
            raise ValueError(
                f"tensor_type must be one of {get_args(BlockType)}, got {tensor_type!r}"
            )
        self.tensor_type = tensor_type
        layout = self.layout
        if in_features % layout.values:
            raise ValueError(
                f"in_features of {tensor_type} must be a multiple of {layout.values}, "
                f"got {in_features}"
            )
        packed = packed_shape(out_features, layout.planes * in_features)
        self.qweight = frozen(torch.zeros(packed, device=device, dtype=torch.int32))
        shape = (out_features, in_features // layout.values * layout.header_bytes)
        headers = torch.zeros(shape, device=device, dtype=torch.uint8)
        parts = split_headers(headers, tensor_type)
        for name in _SCALES:
            self.register_parameter(name, frozen(parts[name]) if name in parts else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, tensor_type: BlockType = "q4_k") -> Self:
        """Quantises ``linear`` by ``GgufConfig``'s search, on the device of its weight.

        The bias keeps its own tensor. Raises ValueError as ``__init__`` does, and for a meta,
        non-float or non-finite weight, or one beyond the range of fp16.
        """
        # Imported here because the quantisation package imports this module.
        from effllm.quantization.gguf_blocks import quantise_fitting

        sizes = (linear.in_features, linear.out_features)
        cls(*sizes, bias=False, tensor_type=tensor_type, device="meta")  # checks both
        found = quantise_fitting(linear.weight.detach(), tensor_type, None)
        return cls.from_codes(linear, found.codes, found.headers, tensor_type)

    @classmethod
    def from_codes(
        cls, linear: nn.Linear, codes: Tensor, headers: Tensor, tensor_type: BlockType
    ) -> Self:
        """Takes the place of ``linear``, with blocks that a method has found for its weight.

        Args:
            linear: gives the sizes, the bias (its own tensor) and the training mode.
            codes: uint8 ``[N, K]``, of Q8_0 plus 128.
            headers: uint8 ``[N, K / block * bytes]``, what a block of the file has beside its
                codes: fp16 d (Q8_0); fp16 d and dmin, and scales and minima of 6 bits (Q4_K);
                scales and fp16 d (Q6_K).
            tensor_type: of the blocks.

        Raises ValueError as ``__init__`` does, or for headers of another shape.
        """
        sizes = (linear.in_features, linear.out_features)
        module = cls(*sizes, bias=False, tensor_type=tensor_type, device="meta")
        needed = [
            linear.out_features,
            sizes[0] // module.layout.values * module.layout.header_bytes,
        ]
        if list(headers.shape) != needed or headers.dtype != torch.uint8:
            raise ValueError(
                f"headers must be uint8 {needed}, got {headers.dtype} {list(headers.shape)}"
            )
        for name, tensor in packed_blocks(codes, headers, tensor_type).items():
            setattr(module, name, frozen(tensor))
        if linear.bias is not None:
            module.bias = frozen(linear.bias.detach())
        return module.train(linear.training)

    @property
    def layout(self) -> BlockLayout:
        """Of the type."""
        return LAYOUTS[self.tensor_type]

    @property
    def options(self) -> dict[str, Any]:
        return {"tensor_type": self.tensor_type}

    @property
    def codes(self) -> Tensor:
        """uint8 ``[N, K]`` as ``from_codes`` takes them, unpacked anew each time."""
        columns = self.layout.planes * self.in_features
        planes = ops.int4_unpack(self.qweight, self.out_features, columns)
        return from_planes(planes, self.tensor_type)

    @property
    def headers(self) -> Tensor:
        """uint8 as ``from_codes`` takes them, made anew each time."""
        parts = {name: tensor for name in _SCALES if (tensor := getattr(self, name)) is not None}
        return join_headers(parts, self.tensor_type)

    @property
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` that the file's blocks stand for, fp32, computed anew each time."""
        return dequantize_blocks(self.codes, self.headers, self.tensor_type)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` fp16 or bf16 (fp32 too on the CPU) -> ``[..., N]`` of x's dtype."""
        if x.shape[-1:] != (self.in_features,):
            raise RuntimeError(
                f"GgufLinear: x must be [..., {self.in_features}], got {list(x.shape)}"
            )
        count = self.in_features // self.layout.run
        if self.tensor_type == "q8_0":
            planes = x.unflatten(-1, (count, 1, 32)).expand(*x.shape[:-1], -1, 2, -1).flatten(-3)
            scales = self.d.float()
            scales = torch.stack([16 * scales, scales], -1).flatten(-2)
            zeros = torch.zeros(2 * count, device=x.device, dtype=torch.uint8)
            zeros[::2].fill_(8)
            zeros = zeros.expand(self.out_features, -1)
            return ops.int4_gemm(planes, self.qweight, scales, zeros, self.bias, group_size=32)
        scales = _products(self.scales, self.d)
        if self.tensor_type == "q6_k":
            runs = x.unflatten(-1, (count, 1, 16))
            planes = torch.cat([runs, runs / 8], -2).flatten(-3)
            return ops.int4_gemm(planes, self.qweight, 8 * scales, None, self.bias, group_size=32)
        out = ops.int4_gemm(x, self.qweight, scales, None, self.bias, group_size=32)
        rests = torch.sub(_products(self.minima, self.dmin), scales, alpha=8)
        sums = x.unflatten(-1, (count, 32)).sum(-1)
        return out - nn.functional.linear(sums, rests.to(x.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tensor_type={self.tensor_type!r}"
        )

    def _kind(self) -> str:
        return f"a GgufLinear of {self.tensor_type}"


def to_planes(codes: Tensor, tensor_type: BlockType) -> Tensor:
    """Codes of blocks, uint8 ``[N, K]``, as 4-bit codes ``[N, P]`` in the order of the kernel."""
    if tensor_type == "q4_k":
        return codes
    runs = codes.unflatten(-1, (-1, LAYOUTS[tensor_type].run))
    # Of Q6_K both are around 8, which stands for 0: 8 (h - 8) + (l - 8) = code - 32.
    parts = [runs >> 4, runs & 15] if tensor_type == "q8_0" else [(runs >> 3) + 4, (runs & 7) + 8]
    return torch.stack(parts, -2).flatten(-3)


def from_planes(planes: Tensor, tensor_type: BlockType) -> Tensor:
    """The inverse of ``to_planes``."""
    if tensor_type == "q4_k":
        return planes
    high, low = planes.unflatten(-1, (-1, 2, LAYOUTS[tensor_type].run)).unbind(-2)
    codes = (high << 4) | low if tensor_type == "q8_0" else (high - 4 << 3) | (low - 8)
    return codes.flatten(-2)


def packed_blocks(codes: Tensor, headers: Tensor, tensor_type: BlockType) -> dict[str, Tensor]:
    """The parameters of a layer, ``qweight`` first, of what ``GgufLinear.from_codes`` takes."""
    planes = ops.int4_pack(to_planes(codes, tensor_type))
    return {"qweight": planes} | split_headers(headers, tensor_type)


def split_headers(headers: Tensor, tensor_type: BlockType) -> dict[str, Tensor]:
    """The parameters of a layer that its headers ``[N, ...]`` hold, in memory of their own."""
    blocks = headers.unflatten(-1, (-1, LAYOUTS[tensor_type].header_bytes))
    if tensor_type == "q4_k":
        scales, minima = k_scales(blocks)
        parts = {
            "d": blocks[..., 0:2].contiguous().view(torch.float16),
            "scales": scales,
            "dmin": blocks[..., 2:4].contiguous().view(torch.float16),
            "minima": minima,
        }
    else:
        parts = {"d": blocks[..., -2:].contiguous().view(torch.float16)}
        if tensor_type == "q6_k":
            parts["scales"] = blocks[..., :16].contiguous().view(torch.int8)
    return {name: part.flatten(-2).clone() for name, part in parts.items()}


def join_headers(parts: dict[str, Tensor], tensor_type: BlockType) -> Tensor:
    """The inverse of ``split_headers``."""
    d = parts["d"].unsqueeze(-1)
    if tensor_type == "q8_0":
        return d.view(torch.uint8).flatten(-2)
    scales = parts["scales"].unflatten(-1, (d.shape[-2], -1))
    if tensor_type == "q6_k":
        return torch.cat([scales.view(torch.uint8), d.view(torch.uint8)], -1).flatten(-2)
    minima = parts["minima"].unflatten(-1, (d.shape[-2], -1))
    return k_header(d, parts["dmin"].unsqueeze(-1), scales, minima).flatten(-2)


def _products(scales: Tensor, d: Tensor) -> Tensor:
    """Whole numbers of runs times the number of their block, exact in fp32 ``[N, K / run]``."""
    return (scales.unflatten(-1, (d.shape[-1], -1)) * d.float().unsqueeze(-1)).flatten(-2)


def k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The whole scales and minima, uint8 ``[..., 8]``, of what Q4_K and Q5_K start with:

        0    2    4                                     16
        | d  |dmin| s0 s1 s2 s3 m0 m1 m2 m3 r0 r1 r2 r3 |

    Scale j < 4 is the low 6 bits of s_j. Scale 4 + j has its low 4 bits in those of r_j, and its
    high 2 in those of s_j. Minima are the same with m_j and the high nibble of r_j.
    """
    s, m, r = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([s & 63, (r & 15) | (s >> 6 << 4)], -1)
    return scales, torch.cat([m & 63, (r >> 4) | (m >> 6 << 4)], -1)


def k_header(d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """uint8 ``[..., 16]``, the inverse of ``k_scales``: fp16 d and dmin ``[..., 1]``, and whole
    scales and minima ``[..., 8]`` in 0..63, uint8."""
    s, m = scales.split(4, -1), minima.split(4, -1)
    parts = [s[0] | (s[1] >> 4 << 6), m[0] | (m[1] >> 4 << 6), (s[1] & 15) | (m[1] << 4)]
    return torch.cat([*(x.contiguous().view(torch.uint8) for x in (d, dmin)), *parts], -1)


def dequantize_blocks(codes: Tensor, headers: Tensor, tensor_type: BlockType) -> Tensor:
    """The values fp32 ``[N, K]`` of codes and headers, rounded at most once."""
    layout, parts = LAYOUTS[tensor_type], split_headers(headers, tensor_type)
    scales = parts["d"].float()
    if "scales" in parts:
        scales = _products(parts["scales"], parts["d"])
    runs = codes.unflatten(-1, (-1, layout.run)).float() - layout.middle
    values = runs * scales.unsqueeze(-1)
    if "minima" in parts:
        values -= _products(parts["minima"], parts["dmin"]).unsqueeze(-1)
    return values.flatten(-2)
