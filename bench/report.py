"""Result rows (JSON) -> a Markdown table, and a plot.

python bench/report.py bench/results/*.json
python bench/report.py rows.json --peers peers.json --plot rows.png

With --peers, a column says how many times faster than the best peer of the same shape we are. The
peers file holds measurements of other libraries on one card:

- "gemm": rows with op, N, K, M, best_peer, best_peer_us, cublas_bf16_us;
- "attention": rows with group ("decode", "prefill", ...), impl, B, S, hq, hk, page, us.

Cards drift, so where both sides timed torch.mm on the same shape in the same run (a row's baseline
is "torch.mm"), the ratios to it are compared; otherwise the times are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]

GEMM_PEERS = {
    "int4_gemm": "int4_gemm (W4A16 g128)",
    "w4a8_gemm": "int4 W4A8 (fp8 activations)",
    "w4a8_gemm/multipliers": "int4 W4A8 (fp8 activations)",
    "int8_gemm": "int8 W8A8",
    "fp8_gemm": "fp8_gemm (row- or tensor-wise)",
    "fp8_gemm/row": "fp8_gemm (row- or tensor-wise)",
    "fp8_gemm/tensor": "fp8_gemm (row- or tensor-wise)",
    "fp8_gemm/block": "fp8_gemm (block 1x128/128x128)",
    "sparse24_gemm": "sparse24_gemm (bf16)",
    "sparse24_gemm/fp8": "sparse24_gemm (fp8)",
    "sparse24_gemm/int8": "sparse24_gemm (int8)",
}
"""Our op (with variant) -> the op as peers files name it."""

MATMUL_BASELINE = "torch.mm"
PEER_HEAD_DIM = 128
"""Head dim of all attention rows in peers files, which do not state it."""
PLAIN_ATTENTION = {"B", "S", "HQ", "HKV", "D", "page", "kv_dtype", "q_len"}
"""What a case says of attention without a window or other variants, over equal lengths."""
RIDGE_FLOPS_PER_BYTE = 260
"""Above this an H100 is bound by 16-bit arithmetic (800 TFLOP/s over 3.06 TB/s), below by bytes."""
CPU_RIDGE_FLOPS_PER_BYTE = 12
"""The same for a core of a server with AVX-512 BF16 (200 GFLOP/s over 17 GB/s)."""


@dataclass(frozen=True)
class Peer:
    name: str
    us: float
    speedup: float
    """How many times faster than the peer the row is."""


def best_peer(row: Row, peers: dict[str, list[Row]]) -> Peer | None:
    """The fastest peer measured on the row's shape, None if there is none."""
    if row["op"] in GEMM_PEERS:
        return _gemm_peer(row, peers["gemm"])
    if row["op"] == "paged_attention":
        return _attention_peer(row, peers["attention"])
    return None


def _gemm_peer(row: Row, peers: list[Row]) -> Peer | None:
    shape = {key: row["case"][key] for key in ("N", "K", "M")}
    wanted = {"op": GEMM_PEERS[row["op"]]} | shape
    for peer in peers:
        if wanted.items() <= peer.items():
            us = peer["best_peer_us"]
            speedup = us / row["us"]
            if row["baseline"] == MATMUL_BASELINE:
                speedup *= row["baseline_us"] / peer["cublas_bf16_us"]
            return Peer(peer["best_peer"], us, speedup)
    return None


def _attention_peer(row: Row, peers: list[Row]) -> Peer | None:
    case = row["case"]
    if case["D"] != PEER_HEAD_DIM or case["kv_dtype"] not in ("bf16", "fp16", "e4m3"):
        return None
    if set(case) > PLAIN_ATTENTION:  # no peer was measured on it
        return None
    fp8 = case["kv_dtype"] == "e4m3"
    wanted = {"S": case["S"], "hq": case["HQ"], "hk": case["HKV"]}
    if case["q_len"] == 1:
        groups, wanted["B"] = {"decode", "pa"}, case["B"]
    elif case["q_len"] == case["S"] and case["B"] == 1:
        groups = {"prefill"}
    else:
        return None
    candidates = [
        peer
        for peer in peers
        # Page 0 marks a contiguous cache: not the same problem.
        if peer["group"] in groups
        and wanted.items() <= peer.items()
        and peer.get("page") != 0
        and ("fp8" in peer["impl"]) == fp8
    ]
    if not candidates:
        return None
    best = min(candidates, key=lambda peer: peer["us"])
    return Peer(best["impl"], best["us"], best["us"] / row["us"])


def rate(row: Row) -> str:
    """The rate that the problem is bound by, with its unit."""
    flops, bytes_ = row["tflop_per_s"] * 1e12, row["gb_per_s"] * 1e9
    ridge = CPU_RIDGE_FLOPS_PER_BYTE if row["timer"] == "host" else RIDGE_FLOPS_PER_BYTE
    if flops > ridge * bytes_:
        return f"{flops * 1e-12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops * 1e-12:.2f} TFLOP/s"
    return f"{row['gb_per_s']:.0f} GB/s"


def label(row: Row) -> str:
    return " ".join(f"{key}{value}" for key, value in row["case"].items())


def table(rows: list[Row], peers: dict[str, list[Row]] | None = None) -> str:
    """A Markdown table, one line per row, grouped by card."""
    header = ["op", "case", "dtype", "g", "us", "rate", "of limit", "baseline", "us", "x baseline"]
    if peers:
        header += ["best peer", "us", "x peer"]
    lines = []
    for card in dict.fromkeys(row["card"] for row in rows):
        of_card = [row for row in rows if row["card"] == card]
        versions = sorted({f"torch {r['torch']}, CUDA {r['cuda'] or '-'}" for r in of_card})
        commits = sorted({str(row["commit"]) for row in of_card})
        lines += [f"**{card}** ({'; '.join(versions)}; commit {', '.join(commits)})", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for row in of_card:
            limit = row["limit_fraction"]
            cells = [
                row["op"],
                label(row),
                row["dtype"] or "-",
                str(row["group_size"] or "-"),
                f"{row['us']:.1f}",
                rate(row),
                "-" if limit is None else f"{limit:.0%}",
                row["baseline"],
                f"{row['baseline_us']:.1f}",
                f"{row['ratio']:.2f}",
            ]
            if peers:
                peer = best_peer(row, peers)
                cells += [peer.name, f"{peer.us:.1f}", f"{peer.speedup:.2f}"] if peer else ["-"] * 3
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, peers: dict[str, list[Row]] | None = None) -> None:
    """The speed-up over the baseline: of matmuls by tokens, of another op a bar per row, of several
    ops a line with a dot per row.

    Raises:
        ImportError: without matplotlib, the [plot] extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'effllm[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if all({"N", "K", "M"} <= set(row["case"]) for row in rows):
        figure = plot_matmuls(rows, peers)
    elif len({row["op"] for row in rows}) == 1:
        figure = plot_bars(rows, peers)
    else:
        figure = plot_ops(rows)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_matmuls(rows: list[Row], peers: dict[str, list[Row]] | None) -> Any:
    """A panel for each op and way to scale: lines of layers over tokens, dotted the best peers'."""
    from matplotlib import colormaps, lines, pyplot

    panels: dict[str, dict[str, list[Row]]] = {}
    colors: dict[str, Any] = {}
    for row in sorted(rows, key=lambda row: row["case"]["M"]):
        details = [str(v) for key, v in row["case"].items() if key not in ("N", "K", "M")]
        layer = f"{row['case']['N']} x {row['case']['K']}"
        panels.setdefault(", ".join([row["op"], *details]), {}).setdefault(layer, []).append(row)
        colors.setdefault(layer, colormaps["tab20"](len(colors)))

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    height = -(-len(panels) // columns)
    size = (1.5 + 4.2 * columns, 0.8 + 3.2 * height)
    figure, grid = pyplot.subplots(
        height, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    handles = [lines.Line2D([], [], color=color, label=layer) for layer, color in colors.items()]
    has_peers = False
    for axes, (title, layers) in zip(grid.flat, panels.items(), strict=False):
        for layer, of_layer in layers.items():
            ours = [(row["case"]["M"], row["ratio"]) for row in of_layer]
            axes.plot(*zip(*ours, strict=True), ".-", c=colors[layer], lw=1)
            theirs = [
                (row["case"]["M"], row["ratio"] / peer.speedup)
                for row in of_layer
                if peers and (peer := best_peer(row, peers))
            ]
            if theirs:
                has_peers = True
                axes.plot(*zip(*theirs, strict=True), ":", c=colors[layer], lw=1)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tokens")
        axes.grid(lw=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("times as fast as the baseline")
    if has_peers:
        handles.append(lines.Line2D([], [], color="black", ls=":", label="best peer"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def plot_bars(rows: list[Row], peers: dict[str, list[Row]] | None) -> Any:
    """A bar per row, with the best peer's speed-up as a mark."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.26 * len(rows)), layout="constrained")
    positions = range(len(rows))
    # On a log axis bars grow from 1: to the right what is faster, to the left what is slower.
    ratios = [row["ratio"] for row in rows]
    axes.barh(positions, [r - 1 for r in ratios], left=1, color="tab:blue", label="effllm")
    if peers:
        marks = [
            (position, row["ratio"] / peer.speedup)
            for position, row in enumerate(rows)
            if (peer := best_peer(row, peers))
        ]
        axes.plot([x for _, x in marks], [y for y, _ in marks], "k|", ms=12, label="best peer")
    finish_ratio_axis(axes, [f"{row['op']} {label(row)}" for row in rows])
    axes.legend(loc="lower right")
    return figure


def plot_ops(rows: list[Row]) -> Any:
    """A line for each op, with a dot per row and a bar at the geometric mean of all."""
    from matplotlib import pyplot

    ops: dict[str, list[float]] = {}
    for row in rows:
        ops.setdefault(row["op"], []).append(row["ratio"])
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.26 * len(ops)), layout="constrained")
    for position, ratios in enumerate(ops.values()):
        axes.plot(ratios, [position] * len(ratios), "o", c="tab:blue", ms=5, alpha=0.5, mew=0)
        axes.plot(geometric_mean(ratios), position, "k|", ms=12)
    finish_ratio_axis(axes, [f"{op} ({len(ratios)})" for op, ratios in ops.items()])
    return figure


def finish_ratio_axis(axes: Any, labels: list[str]) -> None:
    """A line for each label, the first on top, over ratios to the baseline."""
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="x", lw=0.3)
    axes.axvline(1, color="grey", lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # no margins
    axes.set_xlabel("times as fast as the baseline")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Table and plot of benchmark result rows.")
    parser.add_argument(
        "rows", nargs="+", type=Path, help="JSON files written by pytest bench --rows"
    )
    parser.add_argument("--peers", type=Path, help="JSON file of other libraries' measurements")
    parser.add_argument("--plot", type=Path, help="image file to write (needs matplotlib)")
    options = parser.parse_args(arguments)
    rows = [row for path in options.rows for row in json.loads(path.read_text())]
    peers = json.loads(options.peers.read_text()) if options.peers else None
    print(table(rows, peers))
    if options.plot:
        plot(rows, options.plot, peers)


if __name__ == "__main__":
    main()
