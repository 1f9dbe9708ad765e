"""ScaledMethod: what methods share that round weights and inputs to 8-bit codes with scales."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effllm.nn.scaled_linear import InputsPer, ScaledLinear, ScalesPer
from effllm.quantization.granularity import Granularity
from effllm.quantization.method import CHANNEL, TOKEN, Method, ScaledCodes
from effllm.quantization.statistics import InputStatistics

TENSOR = Granularity.tensor()


@dataclass(frozen=True, init=False)
class ScaledMethod(Method):
    """Base of the configs for a ``ScaledLinear``; those say what the attributes may be."""

    kind: ClassVar[type[ScaledLinear]]
    weights_per: ClassVar[Mapping[Granularity, ScalesPer]]
    activations_per: ClassVar[Mapping[Granularity | None, InputsPer | None]]

    inputs: Granularity | None = TOKEN
    static: bool = False

    def __init__(
        self,
        granularity: Granularity = CHANNEL,
        inputs: Granularity | None = TOKEN,
        static: bool = False,
    ) -> None:
        """Raises ValueError for a granularity that no kernel has."""
        for name, value in (
            ("bits", 8),
            ("granularity", granularity),
            ("inputs", inputs),
            ("static", static),
        ):
            object.__setattr__(self, name, value)
        self._check("granularity", granularity, self.weights_per)
        self._check("inputs", inputs, self.activations_per)
        if static and inputs != TENSOR:
            raise ValueError(f"{type(self).__name__}: static is of inputs=tensor(), got {inputs}")

    def _check(
        self, name: str, found: Granularity | None, known: Iterable[Granularity | None]
    ) -> None:
        if found not in known:
            *others, last = map(str, known)
            raise ValueError(
                f"{type(self).__name__}: {name} must be {', '.join(others)} or {last}, got {found}"
            )

    @property
    def needs_calibration(self) -> bool:
        """With ``static``."""
        return self.static

    @staticmethod
    @abstractmethod
    def quantise_weight(weight: Tensor, scales_per: ScalesPer) -> tuple[Tensor, Tensor]:
        """Codes ``[N, K]`` and fp32 scales of a float weight ``[N, K]``, as the layer has them."""

    @staticmethod
    @abstractmethod
    def peak_scale(peaks: Tensor) -> Tensor:
        """The scale ``[1]``, fp32, of inputs whose largest are these, fp32."""

    def quantise(self, weight: Tensor, inputs: InputStatistics | None) -> ScaledCodes:
        """See ``Method.quantise``; scales are fp32 whatever the weight is."""
        codes, scales = self.quantise_weight(weight, self.weights_per[self.granularity])
        input_scale = None
        if self.static and inputs is not None and inputs.tokens:
            input_scale = self.peak_scale(inputs.peak.float())
        inputs_per = self.inputs_per(input_scale)
        return ScaledCodes(self.kind, codes, scales, inputs_per, input_scale)

    def inputs_per(self, input_scale: Tensor | None) -> InputsPer | None:
        """As the layer has it. A layer whose inputs the calibration has not reached has no
        ``input_scale``, and gets its scale at each call."""
        return self.activations_per[self.inputs]
