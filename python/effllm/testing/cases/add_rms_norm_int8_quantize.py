"""Problems for add_rms_norm_int8_quantize: those of rms_norm_int8_quantize, with a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...ops.add_rms_norm_int8_quantize import add_rms_norm_int8_quantize_ref
from .add_rms_norm_fp8_quantize import AddRmsNormFp8QuantizeCase
from .rms_norm_int8_quantize import UNGROUPED, UNGROUPED_BENCH, RmsNormInt8QuantizeCase


@dataclass(frozen=True)
class AddRmsNormInt8QuantizeCase(  # type: ignore[misc]  # the residual is one argument more
    AddRmsNormFp8QuantizeCase, RmsNormInt8QuantizeCase
):
    """x [m, k] and a residual whose rows lie side by side."""

    op: ClassVar[str] = "add_rms_norm_int8_quantize"

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return add_rms_norm_int8_quantize_ref(*args, **kwargs)


CASES = [AddRmsNormInt8QuantizeCase(*problem) for problem in UNGROUPED]
BENCH = [AddRmsNormInt8QuantizeCase(*problem) for problem in UNGROUPED_BENCH]
