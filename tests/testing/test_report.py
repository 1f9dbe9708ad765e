"""Benchmarks end to end on a small case, and the report made of their rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]

BENCHMARK = """
import pytest
import torch
from effllm.ops import int4_pack
from effllm.testing.cases.int4_pack import Int4PackCase

class Wrong(Int4PackCase):
    def reference(self, codes):
        return super().reference(codes) + 1

@pytest.mark.parametrize("case", [Int4PackCase(64, 128), Wrong(8, 8)], ids=lambda case: case.id)
def bench_int4_pack(case, run_case):
    run_case(int4_pack, case)
"""

ROW = {
    "op": "int4_gemm",
    "case": {"N": 4096, "K": 4096, "M": 1},
    "us": 5.0,
    "baseline": "torch.mm",
    "baseline_us": 16.0,
    "ratio": 3.2,
    "limit_fraction": 0.55,
    "gb_per_s": 1700.0,
    "tflop_per_s": 6.7,
    "dtype": "bf16",
    "group_size": 128,
    "timer": "graph",
    "card": "card A",
    "torch": "2.11",
    "cuda": "13.0",
    "commit": "abc",
}
ATTENTION_CASE = {"B": 8, "S": 4096, "HQ": 32, "HKV": 8, "D": 128, "page": 16} | {
    "kv_dtype": "bf16",
    "q_len": 1,
}
ATTENTION = ROW | {
    "op": "paged_attention",
    "case": ATTENTION_CASE,
    "us": 50.0,
    "baseline": "torch",
}
DECODE = {"group": "decode", "B": 8, "S": 4096, "hq": 32, "hk": 8}
PEERS = {
    "gemm": [
        {"op": "int4_gemm (W4A16 g128)", "N": 4096, "K": 4096, "M": 1}
        | {"best_peer": "P", "best_peer_us": 8.0, "cublas_bf16_us": 20.0},
    ],
    "attention": [
        DECODE | {"impl": "slow", "page": 16, "us": 90},
        DECODE | {"impl": "fast", "page": 64, "us": 60},
        DECODE | {"impl": "contiguous", "page": 0, "us": 9},
        DECODE | {"impl": "fp8kv", "page": 16, "us": 8},
        {"group": "prefill", "impl": "pre", "S": 4096, "hq": 32, "hk": 8, "us": 400},
    ],
}


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", REPO / "bench/report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_benchmarks_leave_rows_of_what_is_right(tmp_path: Path, report: ModuleType) -> None:
    path = tmp_path / "bench_int4_pack.py"
    path.write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest"]
    command += ["-c", str(REPO / "bench/pytest.ini"), "--device", "cpu", str(path)]
    search_path = [str(REPO / "bench"), *(p for p in sys.path if p)]
    result = subprocess.run(
        [*command, "--rows", str(tmp_path / "rows")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(search_path), "EFFLLM_COMMIT": "abc"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    # The case with the wrong reference fails before it is timed; the other's row is kept.
    assert result.returncode == 1, result.stdout + result.stderr
    assert "512 of 512 elements differ" in result.stdout
    assert "1 failed, 1 passed" in result.stdout

    (rows,) = (tmp_path / "rows").iterdir()
    assert rows.name.startswith("int4_pack-")
    (row,) = json.loads(rows.read_text())
    assert set(ROW) <= set(row)
    assert (row["op"], row["case"], row["commit"]) == ("int4_pack", {"N": 64, "K": 128}, "abc")
    assert row["us"] > 0
    assert row["ratio"] == pytest.approx(row["baseline_us"] / row["us"], rel=0.01)
    assert "| int4_pack | N64 K128 |" in report.table([row])


def test_table_states_rate_limit_and_baseline(report: ModuleType) -> None:
    text = report.table(
        [ROW, ROW | {"card": "card B", "tflop_per_s": 600.0, "limit_fraction": None}]
    )
    assert "**card A** (torch 2.11, CUDA 13.0; commit abc)" in text
    assert "| int4_gemm | N4096 K4096 M1 | bf16 | 128 | 5.0 | 1700 GB/s | 55% | torch.mm |" in text
    assert "| 600 TFLOP/s | - |" in text


def test_a_cpu_is_bound_by_arithmetic_much_sooner(report: ModuleType) -> None:
    row = ROW | {"timer": "host", "gb_per_s": 1.6, "tflop_per_s": 0.38}
    assert report.rate(row) == "0.38 TFLOP/s"
    assert report.rate(row | {"gb_per_s": 35.0}) == "35 GB/s"


def test_matmul_peers_are_compared_through_the_common_baseline(report: ModuleType) -> None:
    # We: 16 / 5 of torch.mm in our run. They: 20 / 8 in theirs.
    peer = report.best_peer(ROW, PEERS)
    assert (peer.name, peer.us) == ("P", 8.0)
    assert peer.speedup == pytest.approx((16 / 5) / (20 / 8))
    assert report.best_peer(ROW | {"baseline": "other"}, PEERS).speedup == pytest.approx(8 / 5)
    assert report.best_peer(ROW | {"case": {"N": 1, "K": 1, "M": 1}}, PEERS) is None
    assert report.best_peer(ROW | {"op": "int4_pack"}, PEERS) is None


def test_attention_peers_share_shape_cache_type_and_kind(report: ModuleType) -> None:
    def name(**changes: Any) -> str | None:
        peer = report.best_peer(ATTENTION | {"case": ATTENTION_CASE | changes}, PEERS)
        return peer and peer.name

    assert name() == "fast"
    assert report.best_peer(ATTENTION, PEERS).speedup == pytest.approx(60 / 50)
    assert name(kv_dtype="e4m3") == "fp8kv"
    assert name(kv_dtype="int4") is None
    assert name(D=64) is None
    assert name(window=128) is None
    assert name(B=1, q_len=4096) == "pre"
    assert name(q_len=4096) is None
    assert name(q_len=16) is None


def test_command_line(
    tmp_path: Path, report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, peers = tmp_path / "rows.json", tmp_path / "peers.json"
    rows.write_text(json.dumps([ROW, ATTENTION]))
    peers.write_text(json.dumps(PEERS))
    report.main([str(rows), "--peers", str(peers)])
    printed = capsys.readouterr().out
    assert "| P | 8.0 | 1.28 |" in printed
    assert "| fast | 60.0 | 1.20 |" in printed


def test_plot(tmp_path: Path, report: ModuleType) -> None:
    pytest.importorskip("matplotlib", reason="plots need the [plot] extra")
    for rows in ([ROW], [ATTENTION], [ROW, ATTENTION]):
        report.plot(rows, tmp_path / "plot.png", PEERS)
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


def test_ops_have_a_line_each(report: ModuleType) -> None:
    pytest.importorskip("matplotlib", reason="plots need the [plot] extra")
    slower = ATTENTION | {"ratio": ATTENTION["ratio"] / 4}
    (axes,) = report.plot_ops([ATTENTION, ROW, slower]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        f"{ATTENTION['op']} (2)",
        f"{ROW['op']} (1)",
    ]
    dots, mean, *_ = axes.get_lines()
    assert list(dots.get_xdata()) == [ATTENTION["ratio"], slower["ratio"]]
    assert list(mean.get_xdata()) == pytest.approx([ATTENTION["ratio"] / 2])
