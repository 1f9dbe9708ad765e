"""Timers that tell the truth about kernels of a few microseconds.

Two things spoil such timings: launch gaps, which CUDA graphs remove, and data left in the L2 cache
by the repetition before, which a rotation over enough input sets removes.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from effllm.testing.case import Args, Case, Kwargs
from effllm.testing.run import tensors_of

Call = Callable[[], object]

ROTATION_BYTES = 200 * 10**6
"""Input sets take turns until they fill this: four times the 50 MB L2 of an H100."""
MAX_SETS = 64
"""Bounds the rotation of tiny problems: their launch costs more than their bytes, cold or not."""
MAX_SET_BYTES = 8 * 10**9
"""Bounds the memory of all sets together."""
SAMPLES = 5
GRAPH_US = 2000.0
"""A graph does this much work, or 32 calls: its own launch, some 10 us, is then lost in it."""
TARGET_SECONDS = 0.02
"""Duration of one sample: long enough for clocks to settle and event ticks not to matter."""
HOST_SECONDS = 1.0
"""How long all samples on a CPU take: each is one call, and their median wants many."""
MAX_HOST_ROUNDS = 2000


@dataclass(frozen=True)
class Limits:
    """What a device can do at best: measured with a pure read and large matmuls."""

    bytes_per_s: float
    flops_16bit: float
    flops_8bit: float


GPU_LIMITS = {"NVIDIA H100 80GB HBM3": Limits(3.06e12, 800e12, 1500e12)}
"""By the name that the driver gives. A card that nobody measured has no limits here."""


@dataclass(frozen=True)
class Timing:
    """Samples of one call's duration, in microseconds, and how they were taken."""

    samples: tuple[float, ...]
    timer: str
    """"graph": CUDA graph, no launch gaps; "events": CUDA events around eager calls, gaps included;
    "host": wall clock on the CPU."""

    @property
    def us(self) -> float:
        return statistics.median(self.samples)


def input_sets(
    case: Case, device: str | torch.device, total_bytes: int = ROTATION_BYTES
) -> list[tuple[Args, Kwargs]]:
    """Enough sets of the case's arguments, differently seeded, not to fit the L2 cache."""
    sets = [case.make(device, 0)]
    # A cache is far larger than the bytes that one call touches.
    storage = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(sets[0]))
    num_sets = min(
        math.ceil(total_bytes / max(case.bytes(), 1)), MAX_SETS, MAX_SET_BYTES // max(storage, 1)
    )
    return sets + [case.make(device, seed) for seed in range(1, num_sets)]


def time_calls(calls: Sequence[Call], device: str | torch.device) -> Timing:
    """Time one call out of ``calls``, which take turns: the same work on different data.

    On a GPU through a CUDA graph if the calls can be captured, else with events.

    Args:
        calls: at least one; see ``input_sets``.
        device: where the work happens.
    """
    if torch.device(device).type != "cuda":
        return time_in_turn(calls)[0]
    return time_graph(calls) if is_capturable(calls[0]) else time_events(calls)


def is_capturable(call: Call) -> bool:
    """Whether a call never makes the host wait for the GPU, found out by running it once.

    A failed capture would leave the stream and the allocator unusable, so torch is asked to raise
    on the first synchronisation instead.
    """
    call()  # lazy initialisation may synchronise, once
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return True


def time_graph(calls: Sequence[Call]) -> Timing:
    """Time with a CUDA graph of all calls, repeated within the graph until launches are hidden."""
    # One eager pass, which also warms up: slow calls need no repetition within the graph.
    eager_us = time_events(calls, samples=1).us
    rounds = math.ceil(min(32, GRAPH_US / eager_us) / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    samples = _event_samples(graph.replay)
    return Timing(tuple(us / (rounds * len(calls)) for us in samples), "graph")


def time_events(calls: Sequence[Call], samples: int = SAMPLES) -> Timing:
    """Time with CUDA events around eager calls: what Python and the launches cost is included."""

    def run_all() -> None:
        for call in calls:
            call()

    return Timing(tuple(us / len(calls) for us in _event_samples(run_all, samples)), "events")


def time_in_turn(*ways: Sequence[Call]) -> list[Timing]:
    """Time ways of doing the same on the CPU, one call of each after the other, with the wall
    clock: whatever else the machine does meanwhile slows all of them alike.

    Args:
        ways: the calls of each way, which take turns as in ``time_calls``.
    """

    def run(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    first = sum(run(way[0]) for way in ways)  # also the warm-up
    rounds = min(max(SAMPLES, math.ceil(HOST_SECONDS / max(first, 1e-9))), MAX_HOST_ROUNDS)
    samples = [[run(way[i % len(way)]) * 1e6 for way in ways] for i in range(rounds)]
    return [Timing(of_way, "host") for of_way in zip(*samples, strict=True)]


def read_calls(sets: Sequence[tuple[Args, Kwargs]]) -> tuple[list[Call], int]:
    """Calls that do no more than read the largest argument of each set, and its bytes.

    They begin in the middle of the rotation: a read of what was just used would find it cached.
    """
    storages = [max((t.untyped_storage() for t in tensors_of(args)), key=len) for args, _ in sets]
    words = [torch.empty(0, dtype=torch.int64).set_(s, 0, (len(s) // 8,), (1,)) for s in storages]
    middle = len(words) // 2
    return [w.sum for w in words[middle:] + words[:middle]], words[0].nbytes


@functools.cache
def host_flops() -> float:
    """Operations per second of a large bf16 matmul, at best, with the threads that torch uses."""
    a, b = torch.ones(1024, 4096, dtype=torch.bfloat16), torch.ones(4096, 4096).bfloat16()
    (timing,) = time_in_turn([lambda: a @ b.T])
    return 2e6 * a.numel() * b.shape[0] / min(timing.samples)


def limit_fraction(case: Case, us: float, limits: Limits | None) -> float | None:
    """Which part of the device's limit a time reaches: the larger of bytes and arithmetic, each at
    the best rate, divided by the time. None if the limits are not known.

    Args:
        case: says how many bytes and operations the problem is.
        us: measured microseconds.
        limits: ``GPU_LIMITS`` of the card, or what was measured beside the case.
    """
    if limits is None:
        return None
    flops_per_s = limits.flops_8bit if case.math_bits <= 8 else limits.flops_16bit
    return max(case.bytes() / limits.bytes_per_s, case.flops() / flops_per_s) / (us * 1e-6)


def _event_samples(work: Call, samples: int = SAMPLES) -> list[float]:
    """Microseconds of one ``work()`` on the GPU, each sample averaged over repetitions."""

    def run(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / repeats

    run(1)
    repeats = max(1, round(TARGET_SECONDS * 1e6 / max(run(1), 1e-3)))
    return [run(repeats) for _ in range(samples)]
