"""Turns the BENCH cases of an op into benchmarks and result rows.

    pytest bench --rows bench/results              every op; one <op>-<card>.json each
    pytest bench/bench_int4_gemm.py -k M1 --rows out.json

A benchmark file names the op and its cases, and no more:

    @pytest.mark.parametrize("case", BENCH, ids=lambda case: case.id)
    def bench_int4_gemm(case: Case, run_case: RunCase) -> None:
        run_case(int4_gemm, case)
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from effllm.testing.case import SHORT_NAMES, Case
from effllm.testing.run import check_values
from effllm.testing.timing import (
    GPU_LIMITS,
    Limits,
    host_flops,
    input_sets,
    limit_fraction,
    read_calls,
    time_calls,
    time_in_turn,
)

Row = dict[str, Any]
RunCase = Callable[[Callable[..., Any], Case], None]
ROWS = pytest.StashKey[list[Row]]()
MAX_CPU_FLOPS = 8 * 10**9
"""Cases beyond this take a CPU minutes, most of them in the float64 reference."""


class DeviceClock:
    """A clock that GPU time moves: pytest-benchmark's statistics are then about the kernel, not
    about how long Python took to launch it."""

    __name__ = "device_clock"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = DeviceClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effllm")
    group.addoption(
        "--rows", metavar="PATH", help="result rows: a JSON file, or a folder for one per op"
    )
    group.addoption(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    group.addoption("--all", action="store_true", help="on a CPU, also cases over MAX_CPU_FLOPS")
    group.addoption(
        "--no-verify", action="store_true", help="time without checking the values first"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows, target = session.config.stash[ROWS], session.config.getoption("--rows")
    if not rows or not target:
        return
    path = Path(target)
    if path.suffix == ".json":
        write_rows(path, rows)
        return
    for op in sorted({row["op"].split("/")[0] for row in rows}):
        card = re.sub(r"[^A-Za-z0-9]+", "-", rows[0]["card"]).strip("-")
        write_rows(path / f"{op}-{card}.json", [r for r in rows if r["op"].split("/")[0] == op])


def write_rows(path: Path, rows: list[Row]) -> None:
    """A list with one row per line, so that a diff shows which figures moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def card_name(device: str) -> str:
    """The GPU as the driver names it, or the processor with the threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{match[1] if match else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """EFFLLM_COMMIT where the sources travelled without their repository."""
    if "EFFLLM_COMMIT" in os.environ:
        return os.environ["EFFLLM_COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(git, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def measure(function: Callable[..., Any], case: Case, device: str) -> tuple[Row, tuple[float, ...]]:
    """Time an op and its baseline on the same data, in turn; the row and our samples."""
    sets = input_sets(case, device)
    ways = (
        [partial(function, *a, **k) for a, k in sets],
        [case.prepare_baseline(*a, **k) for a, k in sets],
    )
    card = card_name(device)
    if torch.device(device).type == "cpu":
        reads, read_bytes = read_calls(sets)
        with torch.inference_mode():  # or each call of ours would first look for gradients
            ours, baseline, read = time_in_turn(*ways, reads)
        # Integer arithmetic has no limit here: nobody measures it.
        limits = Limits(read_bytes / read.us * 1e6, host_flops(), math.inf)
    else:
        ours, baseline = (time_calls(calls, device) for calls in ways)
        limits = GPU_LIMITS.get(card)
    others = time_others(case, sets, device)
    dtype = getattr(case, "dtype", None)
    fraction = limit_fraction(case, ours.us, limits)
    row = {
        "op": f"{case.op}/{case.variant}" if case.variant else case.op,
        "case": case.shape(),
        "us": round(ours.us, 3),
        "baseline": case.baseline_name,
        "baseline_us": round(baseline.us, 3),
        "ratio": round(baseline.us / ours.us, 3),
        "limit_fraction": None if fraction is None else round(fraction, 4),
        "gb_per_s": round(case.bytes() / ours.us * 1e-3, 1),
        "tflop_per_s": round(case.flops() / ours.us * 1e-6, 2),
        "dtype": SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch.")) if dtype else None,
        "group_size": getattr(case, "group_size", None),
        "others_us": others,
        "timer": ours.timer,
        "baseline_timer": baseline.timer,
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }
    return row, ours.samples


def time_others(case: Case, sets: Sequence[tuple[Any, Any]], device: str) -> dict[str, float]:
    prepared = [case.prepare_others(*a, **k) for a, k in sets]
    found = {}
    for name, call in prepared[0].items():
        try:
            call()
        except RuntimeError:  # torch has no kernel for this shape
            continue
        found[name] = round(time_calls([ways[name] for ways in prepared], device).us, 3)
    return found


@pytest.fixture
def run_case(benchmark: Any, request: pytest.FixtureRequest) -> RunCase:
    """Check an op's values on a case, time it and its baseline, and keep the result row."""
    config = request.config

    def run(function: Callable[..., Any], case: Case) -> None:
        device = config.getoption("--device")
        if device == "cpu" and case.flops() > MAX_CPU_FLOPS and not config.getoption("--all"):
            pytest.skip("too large for a CPU: --all runs it")
        if not config.getoption("--no-verify"):
            check_values(function, case, device)
        row, samples = measure(function, case, device)
        remaining = iter(samples)

        def tick() -> None:
            CLOCK.seconds += next(remaining) * 1e-6

        benchmark.pedantic(tick, rounds=len(samples))
        benchmark.extra_info.update(row)
        config.stash[ROWS].append(row)

    return run
