"""Trains the demo models: `python -m effllm.demo.train --out FOLDER`.

Writes `model/` and `draft/` in Hugging Face layout, `training_record.json` and `loss_curve.png`.
Meant for one GPU of the H100 class for a few minutes; `--minutes` sets the time, and the number of
steps follows from the measured speed. Runs from this folder as a plain file too
(`python train.py`), because the machine that trains need not have built effllm.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

if __package__:
    from .evaluate import acceptance, fake_quantise, mean_nll, perplexity
    from .prepare import CONTEXT, VOCABULARY, Data, prepare, save_tokenizer
else:
    from evaluate import (  # type: ignore[import-not-found,no-redef]
        acceptance,
        fake_quantise,
        mean_nll,
        perplexity,
    )
    from prepare import (  # type: ignore[import-not-found,no-redef]
        CONTEXT,
        VOCABULARY,
        Data,
        prepare,
        save_tokenizer,
    )

SEED = 1234


@dataclass(frozen=True)
class Recipe:
    """Shape of a model and how to train it. Every linear's in_features is a multiple of 128."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tie_embeddings: bool
    learning_rate: float
    weight_decay: float
    # The corpus is small, so it is seen many times; the rate is chosen on validation files.
    dropouts: tuple[float, ...]
    max_epochs: int
    windows_per_step: int = 32


MODEL = Recipe(
    hidden_size=256,
    intermediate_size=640,
    layers=7,
    heads=8,
    kv_heads=2,
    tie_embeddings=False,
    learning_rate=2e-3,
    weight_decay=0.5,
    dropouts=(0.05, 0.15),
    max_epochs=40,
)
DRAFT = Recipe(
    hidden_size=128,
    intermediate_size=256,
    layers=3,
    heads=4,
    kv_heads=1,
    tie_embeddings=True,
    learning_rate=3e-3,
    weight_decay=0.1,
    dropouts=(0.0,),
    max_epochs=40,
)


# ------------------------------------------------------------------------------------------ model


def causal_attention(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [B, H, T, D] without a mask tensor: training windows are never padded.

    The stock integration builds a mask when it is compiled, which rules out flash attention.
    """
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("demo_causal", causal_attention)
AttentionMaskInterface.register("demo_causal", lambda *args, **kwargs: None)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=recipe.tie_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    config._attn_implementation = "demo_causal"
    model = LlamaForCausalLM(config)
    # The rate is a tensor, so that trying another one does not compile the model again.
    model.dropout = nn.Parameter(torch.zeros(()), requires_grad=False)

    def drop(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        keep = torch.rand_like(output, dtype=torch.float32) >= model.dropout
        return output * keep / (1 - model.dropout).to(output.dtype)

    if any(recipe.dropouts):
        # LlamaConfig has dropout inside attention only; here on what enters the residual stream.
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model


@torch.no_grad()
def reset(model: LlamaForCausalLM, seed: int) -> None:
    """Initialises all weights in place; residual outputs are scaled down by depth."""
    torch.manual_seed(seed)
    residual_scale = (2 * len(model.model.layers)) ** -0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.03 * (residual_scale if is_residual else 1.0))
        elif weight.dim() == 1:
            weight.fill_(1.0)


# --------------------------------------------------------------------------------------- training


def half_precision(device: torch.device) -> torch.autocast:
    """bf16 matrix products on a GPU; few CPUs have them, so a trial run there stays in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def batches(tokens: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 [size, CONTEXT]: every epoch cuts at another offset, in another order."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(CONTEXT, device=tokens.device)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        order = torch.randperm((tokens.numel() - offset) // CONTEXT, generator=generator)
        for chunk in (offset + CONTEXT * order).to(tokens.device).split(size):
            if chunk.numel() == size:
                yield tokens[chunk[:, None] + columns]


def make_loss(model: LlamaForCausalLM, teacher: nn.Module | None) -> Callable[..., torch.Tensor]:
    """Next-token loss; with a teacher, half of it is the cross entropy to its distribution."""

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with half_precision(ids.device):
            logits = model(ids, use_cache=False).logits.float()
            # Padding the labels instead of slicing the logits saves a copy of the largest tensor.
            labels = F.pad(ids[:, 1:], (0, 1), value=-100)
            hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            if teacher is None:
                return hard
            with torch.no_grad():
                target = teacher(ids, use_cache=False).logits.float().softmax(-1)
            return 0.5 * hard - 0.5 * (target * logits.log_softmax(-1)).sum(-1).mean()

    return loss


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over 3 %, then a cosine down to zero."""
    warmup = max(steps * 3 // 100, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def fit(
    model: LlamaForCausalLM,
    loss_function: Callable[..., torch.Tensor],
    data: Data,
    recipe: Recipe,
    dropout: float,
    steps: int,
    report_every: int,
) -> list[dict[str, float]]:
    """Trains from fresh weights; returns the loss curve (nats per token)."""
    reset(model, SEED)
    model.dropout.fill_(dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() == 2]},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    stream = batches(data.train, recipe.windows_per_step, SEED)
    curve: list[dict[str, float]] = []
    recent: list[torch.Tensor] = []
    for step in range(1, steps + 1):
        model.train()
        loss = loss_function(next(stream))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        plan.step()
        # Kept on the device: reading each loss would stall the queue of kernels.
        recent.append(loss.detach())
        if step % report_every == 0 or step == steps:
            with half_precision(data.train.device):
                row = {
                    "step": step,
                    "tokens": step * recipe.windows_per_step * CONTEXT,
                    "train": torch.stack(recent).mean().item(),
                    "validation": mean_nll(model, data.validation),
                    "held_out": mean_nll(model, data.held_out),
                }
            recent.clear()
            curve.append(row)
            print(json.dumps(row), flush=True)
    return curve


@dataclass
class Result:
    """One trained model in fp32 and the runs it was chosen from."""

    model: LlamaForCausalLM
    trials: list[dict[str, Any]]


def train(
    recipe: Recipe,
    data: Data,
    deadline: float,
    fixed_steps: int | None,
    teacher: nn.Module | None = None,
) -> Result:
    """Tries each dropout of the recipe for an equal share of the time; validation decides."""
    device = data.train.device
    model = build_model(recipe).to(device)
    function = torch.compile(make_loss(model, teacher), disable=device.type == "cpu")

    def timed(steps: int) -> float:
        start = time.monotonic()
        fit(model, function, data, recipe, recipe.dropouts[0], steps, steps)
        return time.monotonic() - start

    steps = fixed_steps
    if steps is None:
        timed(3)  # compiles
        short, long = timed(5), timed(45)
        seconds_per_step = (long - short) / 40
        share = (deadline - time.monotonic()) / len(recipe.dropouts)
        # The 25 reports of a run cost time as well; `short` is nearly all report.
        available = int((share - 25 * short) / seconds_per_step)
        step_tokens = recipe.windows_per_step * CONTEXT
        steps = max(min(available, recipe.max_epochs * data.train.numel() // step_tokens), 100)
        print(f"{step_tokens / seconds_per_step:.3g} tokens/s, {steps} steps", flush=True)
    trials: list[dict[str, Any]] = []
    best: dict[str, torch.Tensor] = {}
    for dropout in recipe.dropouts:
        start = time.monotonic()
        curve = fit(model, function, data, recipe, dropout, steps, max(steps // 25, 1))
        last = curve[-1]
        if all(last["validation"] < trial["curve"][-1]["validation"] for trial in trials):
            best = copy.deepcopy(model.state_dict())
        seconds = time.monotonic() - start
        epochs = last["tokens"] / data.train.numel()
        trials.append({"dropout": dropout, "seconds": seconds, "epochs": epochs, "curve": curve})
    model.load_state_dict(best)
    return Result(model, trials)


def save_model(model: LlamaForCausalLM, cache: Path, folder: Path) -> None:
    """Writes the model in bf16 with its generation settings and its tokenizer."""
    model = copy.deepcopy(model)
    del model.dropout
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(Tokenizer.from_file(str(cache / "tokenizer.json")), folder)


def judge(folder: Path, windows: torch.Tensor) -> dict[str, float]:
    """Held-out perplexities of a saved model: bf16 weights, and int4 weights in fp32 arithmetic."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(windows.device)
    in_fp32 = copy.deepcopy(model).float()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_perplexity_bf16": perplexity(model, windows),
        "held_out_perplexity_fp32": perplexity(in_fp32, windows),
        "held_out_perplexity_int4_g64": perplexity(fake_quantise(in_fp32, 64), windows),
        "held_out_perplexity_int4_g128": perplexity(fake_quantise(in_fp32, 128), windows),
    }


def print_samples(folder: Path, device: torch.device) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(SEED)
    for prompt, sampling in (
        # No newline at the end: the tokenizer joins it with the indentation that follows.
        ("def read_lines(path):", {"do_sample": False}),
        ("import os\n\ndef main():", {"do_sample": True, "temperature": 0.7, "top_k": 0}),
    ):
        ids = tokenizer(prompt, return_tensors="pt").to(device)
        out = model.generate(**ids, max_new_tokens=160, **sampling)
        print("-" * 40, tokenizer.decode(out[0]), sep="\n", flush=True)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, name in zip(all_axes, ("model", "draft"), strict=True):
        for trial, style in zip(record[name]["trials"], ("-", "--", ":"), strict=False):
            rows = trial["curve"]
            for key, colour in (("train", "C0"), ("validation", "C2"), ("held_out", "C1")):
                label = f"{key.replace('_', '-')}, dropout {trial['dropout']}"
                x = [row["tokens"] / 1e6 for row in rows]
                axes.plot(x, [row[key] for row in rows], style, color=colour, label=label)
        axes.set(title=name, xlabel="million tokens", ylabel="loss (nats per token)")
        axes.set_ylim(1.0, 3.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the effllm demo models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stdlib", help="standard library folder (default: the running Python's)")
    parser.add_argument("--cache", type=Path, help="folder for tokenizer and tokens (default: out)")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for everything")
    parser.add_argument("--steps", type=int, help="steps per run instead of a time budget")
    parser.add_argument("--windows-per-step", type=int, default=32)
    options = parser.parse_args()

    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    cache = options.cache or options.out
    options.out.mkdir(parents=True, exist_ok=True)
    data, description = prepare(options.stdlib, cache)
    data = Data(**{name: tensor.to(device) for name, tensor in vars(data).items()})
    record: dict[str, Any] = {
        "seed": SEED,
        "corpus": description,
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }

    seconds = 60 * options.minutes
    teacher: LlamaForCausalLM | None = None
    # The draft gets a fifth of the time, judging and saving what is left after 92 %.
    for name, recipe, until in (("model", MODEL, 0.72), ("draft", DRAFT, 0.92)):
        recipe = dataclasses.replace(recipe, windows_per_step=options.windows_per_step)
        deadline = start + until * seconds
        result = train(recipe, data, deadline, options.steps, teacher)
        save_model(result.model, cache, options.out / name)
        record[name] = dataclasses.asdict(recipe) | judge(options.out / name, data.held_out)
        record[name]["trials"] = result.trials
        print(name, {k: v for k, v in record[name].items() if k != "trials"}, flush=True)
        if teacher is not None:
            record["acceptance"] = acceptance(teacher, result.model.eval(), data.held_out)
            print("acceptance", record["acceptance"], flush=True)
        teacher = result.model.eval().requires_grad_(False)
    record["minutes"] = (time.monotonic() - start) / 60
    (options.out / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, options.out / "loss_curve.png")
    print_samples(options.out / "model", device)


if __name__ == "__main__":
    main()
