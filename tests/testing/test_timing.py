"""Timers measure what they claim; limits are fractions of the card's best."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from effllm.testing import timing
from effllm.testing.case import Args, Case, Kwargs


@dataclass(frozen=True)
class Copy(Case):
    """Copies n floats."""

    n: int
    op: ClassVar[str] = "copy"

    @property
    def id(self) -> str:
        return f"n{self.n}"

    def make(self, device: str | torch.device, seed: int = 0) -> tuple[Args, Kwargs]:
        return (torch.full((self.n,), float(seed), device=device),), {}

    def reference(self, x: Tensor) -> Tensor:
        return x.double()

    def baseline(self, x: Tensor) -> Tensor:
        return x.clone()

    def bytes(self) -> int:
        return 8 * self.n

    def flops(self) -> int:
        return 0

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n}


def test_input_sets_exceed_the_cache_and_differ() -> None:
    sets = timing.input_sets(Copy(1000), "cpu", total_bytes=80_000)
    assert len(sets) == 10
    assert [args[0][0].item() for args, _ in sets] == list(range(10))
    assert len(timing.input_sets(Copy(1000), "cpu", total_bytes=1)) == 1
    assert len(timing.input_sets(Copy(1), "cpu")) == timing.MAX_SETS


def test_input_sets_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is larger than the bytes that a call touches."""
    monkeypatch.setattr(timing, "MAX_SET_BYTES", 3 * 4000)
    assert len(timing.input_sets(Copy(1000), "cpu")) == 3
    monkeypatch.setattr(timing, "MAX_SET_BYTES", 1)
    assert len(timing.input_sets(Copy(1000), "cpu")) == 1


def test_host_timer_takes_calls_and_ways_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "HOST_SECONDS", 0.04)
    order: list[str] = []

    def sleep(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    fast, slow = timing.time_in_turn(
        [partial(sleep, "a", 0.002), partial(sleep, "b", 0.002)], [partial(sleep, "c", 0.004)]
    )
    assert order[:2] == ["a", "c"]  # the warm-up
    assert order[2:] == (["a", "c", "b", "c"] * len(order))[: len(order) - 2]
    assert fast.timer == slow.timer == "host"
    assert len(fast.samples) == len(slow.samples) >= timing.SAMPLES
    # A sleep never ends early; how late it ends is up to a busy machine.
    assert 2000 <= fast.us < 20_000
    assert 4000 <= slow.us < 20_000
    assert timing.time_calls([partial(sleep, "d", 0.001)], "cpu").timer == "host"


def test_reads_sum_the_largest_argument_from_the_middle_of_the_rotation() -> None:
    sets: list[tuple[Args, Kwargs]] = [
        ((torch.zeros(2), None, torch.full((4, 3), i, dtype=torch.int64).T[1:]), {})
        for i in range(5)
    ]
    calls, num_bytes = timing.read_calls(sets)
    assert num_bytes == 96  # all of the storage, whatever the view
    assert [int(call()) for call in calls] == [24, 36, 48, 0, 12]  # type: ignore[call-overload]


def test_arithmetic_of_the_host_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "HOST_SECONDS", 0.0)
    timing.host_flops.cache_clear()
    rate = timing.host_flops()
    assert 1e7 < rate < 1e15  # no CPU is as slow or as fast
    assert timing.host_flops() == rate
    timing.host_flops.cache_clear()


def test_the_default_baseline_call_is_the_baseline() -> None:
    case = Copy(5)
    args, kwargs = case.make("cpu", seed=3)
    assert torch.equal(case.prepare_baseline(*args, **kwargs)(), args[0])


def test_limit_fraction_takes_the_nearer_limit() -> None:
    limits = timing.GPU_LIMITS["NVIDIA H100 80GB HBM3"]

    @dataclass(frozen=True)
    class Work(Copy):
        n: int = 0
        num_bytes: int = 0
        num_flops: int = 0

        def bytes(self) -> int:
            return self.num_bytes

        def flops(self) -> int:
            return self.num_flops

    class Work8Bit(Work):
        math_bits: ClassVar[int] = 8

    by_bytes = timing.limit_fraction(Work(num_bytes=3_060_000, num_flops=1), 2.0, limits)
    by_flops: Any = timing.limit_fraction(Work(num_flops=800_000_000), 4.0, limits)
    assert by_bytes == pytest.approx(0.5)
    assert by_flops == pytest.approx(0.25)
    assert timing.limit_fraction(Work8Bit(num_flops=1_500_000_000), 1.0, limits) == pytest.approx(
        1.0
    )
    assert timing.limit_fraction(Work(num_bytes=1), 1.0, None) is None


@pytest.mark.gpu
def test_graph_timer_does_not_beat_the_memory() -> None:
    """16 MB read and 16 MB written would fit the L2 cache; in turns over many sets they do not."""
    case = Copy(4 * 10**6)
    calls = [lambda x=args[0]: x.clone() for args, _ in timing.input_sets(case, "cuda")]
    result = timing.time_calls(calls, "cuda")
    assert result.timer == "graph"
    # 5 TB/s is more than any card to date sustains.
    assert result.us > case.bytes() / 5e6


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_is_timed_with_events() -> None:
    x = torch.ones(1000, device="cuda")
    assert timing.is_capturable(lambda: x * 2)
    assert not timing.is_capturable(lambda: x.sum().item())
    assert timing.time_calls([lambda: x.sum().item()], "cuda").timer == "events"
    assert torch.cuda.get_sync_debug_mode() == 0
