"""The case object that tests and benchmarks share.

One frozen dataclass per op, in ``effllm/testing/cases/<op>.py``, describes a problem: its shapes,
its data, its exact answer, what plain PyTorch would do, and how much work it is. The module holds
two lists of them, ``CASES`` (small, for tests) and ``BENCH`` (shapes of models, for benchmarks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

SHORT_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "e4m3",
}
"""Dtypes as result rows call them."""


class Case(ABC):
    """One problem for one op. Subclasses are frozen dataclasses whose fields are the shapes."""

    op: ClassVar[str]
    """Name of the op, as in ``torch.ops.effllm.<op>``."""
    variant: ClassVar[str] = ""
    """What a result row appends to the op's name, as in ``fp8_gemm/block``."""
    math_bits: ClassVar[int] = 16
    """Width of the multiplier inputs: picks the arithmetic limit that a benchmark compares with."""
    baseline_name: ClassVar[str] = "torch"
    """What ``baseline`` is, in a word, for result rows."""

    @property
    @abstractmethod
    def id(self) -> str:
        """Readable pytest id, unique within its list."""

    @abstractmethod
    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        """Arguments of the public function: fresh tensors, the same values on every device."""

    @abstractmethod
    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The exact result: float64 where the op returns floats, the op's own dtype where the
        result must match to the bit. For a mutating op: the expected mutated tensors, in schema
        order."""

    @abstractmethod
    def baseline(self, *args: Any, **kwargs: Any) -> Any:
        """The same maths in plain PyTorch at the op's own precision, shaped like ``reference``."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes that any implementation has to move: inputs read once, outputs written once."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of the definition; a multiply-add counts two."""

    @abstractmethod
    def shape(self) -> dict[str, int | str]:
        """The result row's ``case``: N, K, M for matmuls; B, S, HQ, HKV, D, page, kv_dtype, q_len
        for attention."""

    def prepare_baseline(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """The call that benchmarks time as the baseline.

        Override it where a user of plain PyTorch would do part of ``baseline`` once and not per
        call: dequantise a weight, gather a paged cache.
        """
        return lambda: self.baseline(*args, **kwargs)

    def prepare_others(self, *args: Any, **kwargs: Any) -> dict[str, Callable[[], Any]]:
        """What benchmarks time beside it, by name. One that torch refuses is left out."""
        return {}
