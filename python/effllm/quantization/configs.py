"""The configs that ``quantize_`` takes: one for each method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, get_args

from torch import Tensor

from effllm.nn.gguf_linear import LAYOUTS
from effllm.nn.packed_linear import GROUP_SIZES
from effllm.quantization.awq import quantise_clipped, search_scales
from effllm.quantization.folding import Fold
from effllm.quantization.gguf_blocks import BLOCK, GgufType, quantise_gguf
from effllm.quantization.gptq import quantise_gptq
from effllm.quantization.granularity import Granularity
from effllm.quantization.kmeans import quantise_kmeans
from effllm.quantization.method import (
    CHANNEL,
    CodebookCodes,
    GgufCodes,
    Method,
    UniformCodes,
    UniformMethod,
)
from effllm.quantization.round_to_nearest import round_to_nearest
from effllm.quantization.statistics import InputStatistics


@dataclass(frozen=True)
class LinearConfig(UniformMethod):
    """Linear quantisation by rounding to nearest, with optional clipping; needs no calibration.

    Attributes:
        bits: 2, 3 or 4; or 8, see ``UniformMethod``.
        granularity: of scales and zero points.
        symmetric: zero point in the middle everywhere; otherwise zero points as fine as the scales.
        clip: choose each range so that the squared error of its weights is smallest (to about 1 %
            of the range); otherwise a range holds all of its weights.
        inputs: token(): layers round their inputs to int8 at each call, with a scale per token
            (``W4A8Linear``); None leaves inputs as they are.
        two_level: of the scales, see ``UniformMethod``.
    """

    name: ClassVar[str] = "linear"

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> UniformCodes:
        """See ``Method.quantise``; the inputs do not matter."""
        rows, columns = self.granularity.weight_tile(*weight.shape[-2:])
        codes, scales, zeros = round_to_nearest(
            weight,
            columns,
            self.symmetric,
            bits=self.bits,
            rows=rows,
            clip=self.clip,
            two_level=self.grid.two_level,
        )
        return UniformCodes(codes, scales, zeros, columns, bits=self.bits)


@dataclass(frozen=True)
class KMeansConfig(Method):
    """Codebooks by k-means (Deep Compression, arXiv:1510.00149), for the codebook kernel.

    A codebook of 16 entries costs as many bytes as 64 codes of 4 bits: one per tensor or channel is
    almost free, one per group of 64 doubles the size.

    Attributes:
        bits: 2, 3 or 4: a codebook has 2**bits entries that differ.
        granularity: tensor(), channel() or group(n): what has a codebook of its own.
        weighted: weights count by the mean square of their input, the diagonal of the Hessian, as
            in SqueezeLLM (arXiv:2306.07629); this needs calibration.
    """

    name: ClassVar[str] = "k-means"
    granularity: Granularity = CHANNEL
    weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity.kind == "block":
            raise ValueError(
                f"KMeansConfig: granularity must be tensor(), channel() or group(n), got "
                f"{self.granularity}: the kernel has no codebooks for blocks"
            )

    @property
    def needs_calibration(self) -> bool:
        """With ``weighted``."""
        return self.weighted

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> CodebookCodes:
        """See ``Method.quantise``."""
        importance = inputs.diagonal if self.weighted and inputs is not None else None
        return quantise_kmeans(weight, self.bits, self.granularity, importance)


@dataclass(frozen=True)
class GptqConfig(UniformMethod):
    """GPTQ (arXiv:2210.17323): rounding errors are made up for by the columns that follow.

    Attributes:
        bits, granularity, symmetric, inputs, two_level: as in ``LinearConfig``.
        clip: choose each range so that the squared error, weighted by the mean square of the
            inputs, is smallest.
        act_order: begin with the channels of the largest inputs, whose errors matter most.
        static_groups: groups are consecutive channels, with scales of the weights as they were.
            Otherwise scales are found when a group starts; with ``act_order`` the groups are then
            of permuted channels, and the layer permutes its inputs (``Int4Linear.perm``).
        damping: added to the Hessian's diagonal, as a part of its mean; ten times more is tried
            until a Cholesky factor exists.
    """

    name: ClassVar[str] = "gptq"
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise ValueError(f"GptqConfig: damping must be in 0..1, got {self.damping}")
        if self.bits == 8 and self.act_order and not self.static_groups:
            raise ValueError(
                "GptqConfig: 8 bits with act_order are of static_groups=True, got False"
            )

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def two_level_needs(self) -> str | None:
        """See ``UniformMethod``; scales of one row are found together."""
        return super().two_level_needs() or (
            None if self.static_groups else "static_groups=True, got False"
        )

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> UniformCodes:
        """See ``Method.quantise``."""
        return quantise_gptq(
            weight,
            InputStatistics(weight.shape[-1], weight.device) if inputs is None else inputs,
            self.grid,
            self.granularity,
            clip=self.clip,
            act_order=self.act_order,
            static_groups=self.static_groups,
            damping=self.damping,
        )


@dataclass(frozen=True)
class AwqConfig(UniformMethod):
    """AWQ (arXiv:2306.00978): input channels are scaled so that important weights are kept well.

    The scales go into the norm or linear layer before, wherever that changes nothing in what the
    model computes, which is tried and not guessed; where key-value heads serve several query heads,
    these share the scales. Elsewhere layers are quantised without.

    Attributes:
        bits, granularity, inputs, two_level: as in ``LinearConfig``; the last, as W4A8 has it by
            default, is of symmetric=True.
        symmetric: False by default, as is usual for the method.
        clip: cut each range where the error of its part of the output is smallest.
        steps: exponents that are tried between 0 and 1.
    """

    name: ClassVar[str] = "awq"
    symmetric: bool = False
    clip: bool = True
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"AwqConfig: steps must be at least 1, got {self.steps}")

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def scales_inputs(self) -> bool:
        """Always."""
        return True

    def input_scales(self, weights: list[Tensor], inputs: InputStatistics, fold: Fold) -> Tensor:
        """See ``Method.input_scales``."""
        grid = replace(self.grid, two_level=False)  # as good for comparing, and quicker
        return search_scales(weights, inputs, fold, grid, self.granularity, self.steps)

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> UniformCodes:
        """See ``Method.quantise``."""
        if self.clip:
            return quantise_clipped(weight, inputs, self.grid, self.granularity)
        plain = LinearConfig(
            self.bits,
            self.granularity,
            self.symmetric,
            inputs=self.inputs,
            two_level=self.two_level,
        )
        return plain.quantise(weight, inputs)


@dataclass(frozen=True, init=False)
class GgufConfig(Method):
    """Blocks as GGUF holds them, with scales found by search: ``effllm.save`` writes such layers as
    "gguf-q4_k" and the like without loss, and ``effllm.load`` gives the same layers back.

    With calibration, errors count by the mean square of the inputs, as with llama.cpp's importance
    matrix; no calibration is needed.

    Attributes:
        tensor_type: Q4_0 and Q4_1 become ``Int4Linear``, all others ``GgufLinear``.

            - "q4_0": 4.5 bits per weight; no zero points, and scales of either sign.
            - "q4_1": 5 bits; zero points.
            - "q8_0": 8.5 bits; blocks of 32 as those two.
            - "q4_k": 4.5 bits; scales and minima of 32 weights, which themselves have 6 bits, in
              blocks of 256. Layers whose inputs are no multiple of 256 become Q4_1.
            - "q6_k": 6.6 bits; scales of 16 weights, of 8 bits, in blocks of 256. Layers whose
              inputs are no multiple of 256 become Q8_0.
    """

    name: ClassVar[str] = "gguf"
    tensor_type: GgufType = "q4_0"

    def __init__(self, tensor_type: GgufType = "q4_0") -> None:
        """Raises ValueError for another type."""
        if tensor_type not in get_args(GgufType):
            raise ValueError(
                f"GgufConfig: tensor_type must be one of {get_args(GgufType)}, got {tensor_type!r}"
            )
        bits, run = 4, BLOCK
        if tensor_type != "q4_0" and tensor_type != "q4_1":
            bits, run = LAYOUTS[tensor_type].bits, LAYOUTS[tensor_type].run
        # Beside the checks of Method, which are for the groups of other kernels.
        for name, value in (
            ("bits", bits),
            ("granularity", Granularity.group(run)),
            ("tensor_type", tensor_type),
        ):
            object.__setattr__(self, name, value)

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> UniformCodes | GgufCodes:
        """See ``Method.quantise``; scales are fp16 whatever the weight is."""
        importance = None if inputs is None or not inputs.tokens else inputs.diagonal
        return quantise_gguf(weight, self.tensor_type, importance)


class Int4Config(LinearConfig):
    """The everyday config: ``LinearConfig`` with 4 bits, without clipping."""

    def __init__(
        self,
        group_size: int = 64,
        symmetric: bool = True,
        *,
        inputs: Granularity | None = None,
        two_level: bool | None = None,
    ) -> None:
        """Args:
            group_size: input channels per scale: 32, 64, 128, or -1 for one per output channel.
            symmetric: zero point 8 everywhere; otherwise one uint8 zero point per group.
            inputs, two_level: as in ``LinearConfig``.

        Raises ValueError for another group size.
        """
        if group_size not in (*GROUP_SIZES, -1):
            raise ValueError(
                "Int4Config: group_size must be 32, 64, 128 or -1 (one group per row), "
                f"got {group_size}"
            )
        channel = Granularity.channel()
        super().__init__(
            4,
            channel if group_size == -1 else Granularity.group(group_size),
            symmetric,
            inputs=inputs,
            two_level=two_level,
        )
