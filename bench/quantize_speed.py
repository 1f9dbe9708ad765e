"""Seconds and peak memory of quantising one decoder layer of an 8B-shaped Llama, by method.

    python bench/quantize_speed.py --device cuda   # bench/results/quantize_speed-<card>.{json,md}
    python bench/quantize_speed.py                 # on the CPU: a layer an eighth as wide

The layer is built here, of random weights and with random inputs, so that nothing but torch is
needed. A layer is measured whole, as ``quantize_`` runs it: its forward passes, sums of inputs,
and all its weights. Multiplied by the number of layers, that is the time of a model, but for
loading it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effllm
from effllm.quantization import (
    AwqConfig,
    GptqConfig,
    Granularity,
    KMeansConfig,
    LinearConfig,
    Method,
)

RESULTS = Path(__file__).parent / "results"
MODEL_LAYERS = 32
GROUP = Granularity.group(128)
METHODS: dict[str, Method] = {
    "linear, clipped": LinearConfig(4, GROUP, symmetric=False, clip=True),
    "GPTQ, act-order": GptqConfig(4, GROUP, symmetric=False),
    "AWQ": AwqConfig(4, GROUP),
    "k-means": KMeansConfig(4, Granularity.channel()),
}


class Attention(nn.Module):
    """Causal attention of grouped heads, without positions: they cost nothing here."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, hidden]`` to the same."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, hidden]`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A block of Llama."""

    def __init__(self, hidden: int, intermediate: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.self_attn = Attention(hidden, heads, kv_heads)
        self.mlp = Mlp(hidden, intermediate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, hidden]`` to the same."""
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """One layer, where the engine looks for blocks."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(*sizes)])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, hidden]`` to the same."""
        out: Tensor = self.layers[0](x)
        return out


def fresh(sizes: tuple[int, ...], device: str) -> Model:
    """The same weights each time, in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        return Model(*sizes).to(torch.bfloat16).eval()


def measure(
    name: str, method: Method, sizes: tuple[int, ...], batches: list[Tensor], device: str
) -> dict[str, Any]:
    """A row: seconds and bytes of one layer."""
    model = fresh(sizes, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    started = time.perf_counter()
    report = effllm.quantize_(
        model,
        method,
        calibration=batches if method.needs_calibration else None,
        progress=False,
    )
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "method": name,
        "layers": len(report.layers),
        "seconds": round(seconds, 3),
        "model_seconds": round(seconds * MODEL_LAYERS, 1),
        "peak_bytes": peak,
        "weight_error": sum(r.weight_error for r in report.layers) / len(report.layers),
    }


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    hidden, intermediate, heads, kv_heads = result["sizes"]
    cuda = result["device"] == "cuda"
    memory = "above weights and inputs" if cuda else "of the process so far"
    lines = [
        f"# Seconds of quantisation on {result['card']}",
        "",
        f"One decoder layer of Llama (hidden {hidden}, intermediate {intermediate}, heads {heads}",
        f"and {kv_heads}) of random bf16 weights, 4 bits, groups of 128 (k-means: a codebook per",
        f"channel), {result['tokens']:,} tokens of calibration, torch {result['torch']}. A model",
        f"is {MODEL_LAYERS} such layers. Made by `bench/quantize_speed.py`.",
        "",
        f"| method | s per layer | min per model | peak GB {memory} |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['method']} | {r['seconds']:.2f} | {r['model_seconds'] / 60:.1f} | "
        f"{r['peak_bytes'] / 1e9:.2f} |"
        for r in result["rows"]
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    """Measures, prints the table, and writes it and its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, help="hidden size, at least 512 (4096; CPU: 512)")
    parser.add_argument("--sequences", type=int, help="of calibration (32; CPU: 2)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each (2048)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cuda, threads = args.device == "cuda", torch.get_num_threads()
    width = args.width or (4096 if cuda else 512)
    sizes = (width, width * 7 // 2, width // 128, max(1, width // 512))
    generator = torch.Generator(args.device).manual_seed(1)
    # Channels of different size, as those of a model: AWQ and act-order have work to do.
    spread = torch.randn(width, generator=generator, device=args.device).exp()
    batches = [
        (
            torch.randn(1, args.context, width, generator=generator, device=args.device) * spread
        ).bfloat16()
        for _ in range(args.sequences or (32 if cuda else 2))
    ]
    # What the first call loads and plans is not a method's.
    warm = (512, 1792, 4, 1)
    for method in METHODS.values():
        measure("", method, warm, [batches[0][:, :256, :512].contiguous()], args.device)
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if cuda else f"{threads} threads of a CPU",
        "device": args.device,
        "torch": torch.__version__,
        "sizes": sizes,
        "tokens": sum(batch.shape[0] * batch.shape[1] for batch in batches),
        "rows": [],
    }
    for name, method in METHODS.items():
        result["rows"].append(measure(name, method, sizes, batches, args.device))
        print(json.dumps(result["rows"][-1]), flush=True)
    print(table(result))
    stem = "quantize_speed-" + result["card"].replace(" ", "-") if cuda else "quantize_speed-CPU"
    (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"{stem}.md").write_text(table(result))


if __name__ == "__main__":
    main()
