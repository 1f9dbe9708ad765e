"""What a method of quantisation is: the base of all configs, and what they make of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effllm.nn import GgufLinear, Int4Linear, Int8Linear, Lut4Linear, W4A8Linear
from effllm.nn.gguf_linear import LAYOUTS, BlockType, dequantize_blocks
from effllm.nn.packed_linear import GROUP_SIZES
from effllm.nn.quantized_linear import QuantizedLinear
from effllm.nn.scaled_linear import BLOCK, InputsPer, ScaledLinear
from effllm.ops.fp8_gemm import dequantize_weight
from effllm.ops.int4_gemm import dequantize_codes
from effllm.ops.lut4_gemm import decode
from effllm.quantization.folding import Fold
from effllm.quantization.granularity import Granularity
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.uniform import Grid

CHANNEL, GROUP_64, TOKEN = Granularity.channel(), Granularity.group(64), Granularity.token()


@dataclass(frozen=True)
class UniformCodes:
    """Codes on uniform grids, ``weight ~ (code - zero) * scale``; see ``Int4Linear``, or of 8 bits,
    without zeros and perm, ``Int8Linear``."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    perm: Tensor | None = None
    bits: int = 4

    def dense(self) -> Tensor:
        """The weight that the codes stand for, fp32 ``[N, K]``."""
        weight = dequantize_codes(
            self.codes,
            self.scales,
            self.zeros,
            group_size=self.group_size,
            middle=Grid(self.bits, True).middle,
        )
        if self.perm is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.perm.long(), weight)

    def layer(
        self, linear: nn.Linear, kind: type[Int4Linear] = Int4Linear, **options: Any
    ) -> QuantizedLinear:
        """The layer that takes the place of ``linear``; options are those of ``from_codes``."""
        if self.bits == 8:
            codes = (self.codes.short() - Grid(8, True).middle).to(torch.int8)
            return Int8Linear.from_codes(linear, codes, self.scales.float(), inputs_per=None)
        return kind.from_codes(
            linear,
            self.codes,
            self.scales,
            self.zeros,
            self.perm,
            group_size=self.group_size,
            **options,
        )


@dataclass(frozen=True)
class CodebookCodes:
    """Codes into codebooks, ``weight ~ codebook[..., code]``; see ``Lut4Linear``."""

    codes: Tensor
    codebook: Tensor
    group_size: int

    def dense(self) -> Tensor:
        """The weight that the codes stand for, fp32 ``[N, K]``."""
        return decode(self.codes, self.codebook, group_size=self.group_size)

    def layer(self, linear: nn.Linear) -> QuantizedLinear:
        """The layer that takes the place of ``linear``."""
        return Lut4Linear.from_codes(linear, self.codes, self.codebook, group_size=self.group_size)


@dataclass(frozen=True)
class ScaledCodes:
    """8-bit codes, ``weight ~ code * scale``, and what becomes of inputs; see ``ScaledLinear``."""

    kind: type[ScaledLinear]
    codes: Tensor
    scales: Tensor
    inputs_per: InputsPer | None
    input_scale: Tensor | None = None
    symmetric_inputs: bool = True

    def dense(self) -> Tensor:
        """The weight that the codes stand for, fp32 ``[N, K]``."""
        return dequantize_weight(self.codes, self.scales)

    def layer(self, linear: nn.Linear) -> QuantizedLinear:
        """The layer that takes the place of ``linear``."""
        options = {} if self.symmetric_inputs else {"symmetric_inputs": False}
        return self.kind.from_codes(
            linear,
            self.codes,
            self.scales,
            self.input_scale,
            inputs_per=self.inputs_per,
            **options,
        )


@dataclass(frozen=True)
class GgufCodes:
    """Blocks of GGUF's Q8_0, Q4_K or Q6_K; see ``GgufLinear``."""

    codes: Tensor
    headers: Tensor
    tensor_type: BlockType

    @property
    def bits(self) -> int:
        """Of a code."""
        return LAYOUTS[self.tensor_type].bits

    def dense(self) -> Tensor:
        """The weight that the codes stand for, fp32 ``[N, K]``."""
        return dequantize_blocks(self.codes, self.headers, self.tensor_type)

    def layer(self, linear: nn.Linear) -> QuantizedLinear:
        """The layer that takes the place of ``linear``."""
        return GgufLinear.from_codes(linear, self.codes, self.headers, self.tensor_type)


Codes = UniformCodes | CodebookCodes | ScaledCodes | GgufCodes


@dataclass(frozen=True)
class Method(ABC):
    """Base of the configs: how a weight becomes codes.

    Attributes:
        bits: of a code: 2, 3 or 4. Those of 2 and 3 bits run on the kernels of 4 bits, in as many
            bytes. FP8 and W8A8 have 8, and uniform methods may.
        granularity: which weights share scales or a codebook. The columns of a group or block are
            32, 64 or 128.
    """

    name: ClassVar[str]
    """As reports call it."""

    known_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)

    bits: int = 4
    granularity: Granularity = GROUP_64

    def __post_init__(self) -> None:
        """Raises ValueError for what no kernel holds."""
        if self.bits not in self.known_bits:
            *others, last = map(str, self.known_bits)
            known = f"{', '.join(others)} or {last}"
            raise ValueError(f"{type(self).__name__}: bits must be {known}, got {self.bits}")
        grained = self.granularity
        if grained.kind == "token" or (grained.columns and grained.columns not in GROUP_SIZES):
            raise ValueError(
                f"{type(self).__name__}: granularity must be tensor(), channel(), group(n) or "
                f"block(m, n) with n in {GROUP_SIZES}, got {grained}"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether ``quantise`` needs statistics of the inputs."""
        return False

    @property
    def scales_inputs(self) -> bool:
        """Whether ``input_scales`` is to be asked."""
        return False

    def input_scales(self, weights: list[Tensor], inputs: InputStatistics, fold: Fold) -> Tensor:
        """Factors ``[P]`` for the input channels of layers with a common input, before they are
        quantised; 1 unless the method does better. Arguments as in ``awq.search_scales``."""
        return torch.ones(fold.gather(inputs.magnitude).shape, device=inputs.magnitude.device)

    def layer(self, codes: Codes, linear: nn.Linear) -> QuantizedLinear:
        """The layer over ``codes``, of ``quantise``, that takes the place of ``linear``."""
        return codes.layer(linear)

    @abstractmethod
    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> Codes:
        """Codes of a float weight ``[N, K]``, with scales or codebooks in its dtype.

        ``inputs`` are statistics of what the layer gets; they may be None unless the method needs
        calibration. Raises ValueError for a weight that is no matrix, on meta or not finite.
        """


@dataclass(frozen=True)
class UniformMethod(Method):
    """Base of the methods whose levels are evenly spaced.

    Attributes:
        bits, granularity: see ``Method``; or 8 bits, with tensor(), channel() or group(128), which
            are symmetric and leave inputs as they are (``Int8Linear``).
        symmetric: zero point 8 everywhere; otherwise zero points as fine as the scales.
        clip: choose each range so that the squared error is smallest; otherwise it holds all
            values.
        inputs: token(): layers round their inputs to int8 at each call, with a scale per token
            (``W4A8Linear``); None leaves inputs as they are (``Int4Linear``).
        two_level: scales of groups or blocks are 1 to 15 times one number of the row, so that sums
            over int8 inputs are exact and faster (the second level of QServe, arXiv:2405.04532).
            Multiples are searched for the least error, with ``clip`` or without. None: wherever
            there are such inputs, groups or blocks, and no zero points.
    """

    known_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    symmetric: bool = True
    clip: bool = False
    inputs: Granularity | None = field(default=None, kw_only=True)
    two_level: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raises ValueError for what no kernel holds."""
        super().__post_init__()
        if self.inputs not in (None, TOKEN):
            raise ValueError(
                f"{type(self).__name__}: inputs must be token() or None, got {self.inputs}"
            )
        if self.two_level and (missing := self.two_level_needs()):
            raise ValueError(f"{type(self).__name__}: two_level needs {missing}")
        if self.bits != 8:
            return
        if self.inputs is not None:
            raise ValueError(
                f"{type(self).__name__}: inputs of 8 bits must be None, got {self.inputs}: "
                "Int8Config rounds weights and inputs to 8 bits"
            )
        if not self.symmetric:
            raise ValueError(f"{type(self).__name__}: 8 bits are of symmetric=True, got False")
        if self.granularity not in (Granularity.tensor(), CHANNEL, Granularity.group(BLOCK)):
            raise ValueError(
                f"{type(self).__name__}: granularity of 8 bits must be tensor(), channel() or "
                f"group({BLOCK}), got {self.granularity}"
            )

    @property
    def grid(self) -> Grid:
        """The levels."""
        two_level = self.two_level is not False and self.two_level_needs() is None
        return Grid(self.bits, self.symmetric, two_level)

    def two_level_needs(self) -> str | None:
        """What scales of two levels need and this config has not, and what it has."""
        if self.inputs is None:
            return "inputs=token(), got None"
        if not self.symmetric:
            return "symmetric=True, got False"
        if not self.granularity.columns:
            return f"granularity group(n) or block(m, n), got {self.granularity}"
        return None

    def layer(self, codes: Codes, linear: nn.Linear) -> QuantizedLinear:
        """See ``Method.layer``."""
        if self.inputs is None or not isinstance(codes, UniformCodes):
            return super().layer(codes, linear)
        return codes.layer(linear, W4A8Linear, two_level=self.grid.two_level)
