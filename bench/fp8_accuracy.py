"""What fp8_gemm loses to sums that are not fp32, over long K with outliers.

    python bench/fp8_accuracy.py --device cuda   # bench/results/fp8_accuracy-<card>.{json,md}

Operands are off-centre, so that sums grow with K, and one column in 512 is a hundred times the
others. Errors are of the outputs' size (root mean squares), against float64 over the same codes and
scales; beside them stand those of fp32 sums, rounded to the same type.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effllm
from effllm.ops import fp8_gemm, fp8_quantize, fp8_quantize_tensor
from effllm.ops.fp8_gemm import fp8_gemm_ref, grouped_product

RESULTS = Path(__file__).parent / "results"
M, N = 128, 512
GRANULARITIES = ("tensor", "row", "block")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def with_outliers(rows: int, k: int, seed: int) -> Tensor:
    """``[rows, k]`` in fp32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=generator) + 0.3
    values[:, torch.randperm(k, generator=generator)[: k // 512]] *= 100
    return values


def quantize(values: Tensor, per: str, rows: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, of blocks of ``rows`` x 128 where ``per`` is "block"."""
    if per == "tensor":
        return fp8_quantize_tensor(values)
    if per == "row":
        return fp8_quantize(values)
    n, k = values.shape
    if rows == 1:
        return fp8_quantize(values, group_size=128)
    codes, scales = fp8_quantize(
        values.view(n // rows, rows, k // 128, 128).transpose(1, 2).reshape(-1, rows * 128)
    )
    blocks = codes.view(n // rows, k // 128, rows, 128).transpose(1, 2).reshape(n, k)
    return blocks, scales.view(n // rows, k // 128)


def measure(per: str, k: int, device: str) -> list[dict[str, Any]]:
    """A row for each type of the output."""
    x, x_scales = quantize(with_outliers(M, k, 0).to(device), per, 1)
    weight, w_scales = quantize(with_outliers(N, k, 1).to(device), per, 128)
    w_scales = w_scales / 256  # into the range of fp16
    args = (x, x_scales, weight, w_scales)
    exact = fp8_gemm_ref(*args, out_dtype=torch.float64)
    plain = grouped_product(*args, torch.float32)

    def error(out: Tensor) -> float:
        return ((out.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    return [
        {
            "scales": per,
            "K": k,
            "out": name,
            "accurate": error(fp8_gemm(*args, out_dtype=dtype)),
            "fast": error(fp8_gemm(*args, out_dtype=dtype, accurate=False)),
            "fp32_sums": error(plain.to(dtype)),
        }
        for name, dtype in DTYPES.items()
    ]


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f"# Errors of fp8_gemm on {result['card']}",
        "",
        f"{M} tokens, {N} features, operands with outliers; relative to the outputs' size, against",
        f"float64 (torch {result['torch']}). In brackets: over those of fp32 sums. Made by",
        "`bench/fp8_accuracy.py`.",
        "",
        "| scales | K | out | accurate | fast | fp32 sums |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for r in result["rows"]:
        found = " | ".join(
            f"{r[mode]:.2e} ({r[mode] / r['fp32_sums']:.2f})" for mode in ("accurate", "fast")
        )
        lines.append(f"| {r['scales']} | {r['K']} | {r['out']} | {found} | {r['fp32_sums']:.2e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints the table, and writes it and its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    card = torch.cuda.get_device_name() if cuda else "a CPU"
    result = {
        "card": card,
        "torch": torch.__version__,
        "effllm": effllm.__version__,
        "rows": [
            row
            for per in GRANULARITIES
            for k in (1024, 4096, 16384)
            for row in measure(per, k, args.device)
        ],
    }
    page = table(result)
    print(page, end="")
    stem = args.out / f"fp8_accuracy-{card.replace(' ', '-')}"
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(page)


if __name__ == "__main__":
    main()
