"""GPTQ and AWQ beside public implementations: errors for the same weights and activations.

    pip install --target SITE --no-deps llmcompressor==0.14.0.1 gptqmodel==7.7.0 <what they import>
    PYTHONPATH=SITE python bench/agreement.py      # bench/results/agreement.{json,md}; 15 minutes

The layers and activations are those of the demo model on one thread of a CPU, in fp32; once as
they are, and once with outlier channels planted into the outputs of the norms, which changes
nothing in what the model computes. Neither package belongs to the project's environment: ours wants
newer releases of what they pin. Their code is called as it is, but for llm-compressor's pinning of
memory, which fails without an accelerator.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from quality import CONTEXT, RESULTS, calibration_tokens
from torch import Tensor, nn

import effllm
from effllm import demo
from effllm.quantization import AwqConfig, GptqConfig, Granularity, dequantize_
from effllm.quantization.statistics import InputStatistics

GROUP = 64
BLOCKS = (0, 3, 6)  # the first, a middle and the last
OUTLIERS, SIZE = 4, 32  # channels of each norm, and by how much


@dataclass(frozen=True)
class Layer:
    """A linear layer: its weight ``[N, K]``, and inputs ``[T, K]`` to learn from and to judge."""

    weight: Tensor
    seen: Tensor
    held_out: Tensor


def record(model: Any, tokens: Tensor, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Arguments, keyword arguments and output of each module for the tokens."""
    found = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, out: found.update({name: (args, kwargs, out)})

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def layers(model: Any, calibration: Tensor, held_out: Tensor) -> Iterator[Layer]:
    """The linear layers of three blocks."""
    modules = {
        f"{i}.{name}": module
        for i in BLOCKS
        for name, module in model.model.layers[i].named_modules()
        if type(module) is nn.Linear
    }
    seen, later = (record(model, tokens, modules) for tokens in (calibration, held_out))
    for name, module in modules.items():
        x, y = (found[name][0][0].flatten(0, -2) for found in (seen, later))
        yield Layer(module.weight.detach(), x, y)


# -- GPTQ, layer by layer -------------------------------------------------------------------------


@dataclass(frozen=True)
class GptqCase:
    """Settings that all three have; groups are consecutive channels."""

    bits: int
    symmetric: bool
    act_order: bool


def ours(layer: Layer, case: GptqCase) -> Tensor:
    """The decoded weight."""
    inputs = InputStatistics(layer.weight.shape[1])
    inputs.add(layer.seen)
    config = GptqConfig(
        case.bits, Granularity.group(GROUP), case.symmetric, act_order=case.act_order
    )
    return config.quantise(layer.weight, inputs).dense()


def llm_compressor(layer: Layer, case: GptqCase) -> Tensor:
    """The same by ``quantize_weight``, with the scales of its min-max observer."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=case.bits,
        symmetric=case.symmetric,
        strategy="group",
        group_size=GROUP,
        actorder="static" if case.act_order else None,
    )
    groups = layer.weight.unflatten(1, (-1, GROUP))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    hessian = 2 * layer.seen.T @ layer.seen / len(layer.seen)
    weight, _, _ = quantize_weight(
        layer.weight[None].clone(), hessian[None], scales[None], zeros[None], None, args
    )
    return weight[0]


def gptq_model(layer: Layer, case: GptqCase) -> Tensor:
    """The same by GPTQModel's ``GPTQ``."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    n, k = layer.weight.shape
    linear = nn.Linear(k, n, bias=False)
    linear.weight.copy_(layer.weight)
    config = QuantizeConfig(
        bits=case.bits,
        group_size=GROUP,
        sym=case.symmetric,
        desc_act=case.act_order,
        act_group_aware=False,
        static_groups=True,
        damp_percent=0.01,
    )
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(layer.seen[None], None)
    weight: Tensor = task.quantize()[0]
    return weight


def output_error(layer: Layer, weight: Tensor, x: Tensor) -> float:
    """Squared error of the output over its energy, fp64."""
    x, true = x.double(), layer.weight.double()
    return float((x @ (weight - true).T).square().sum() / (x @ true.T).square().sum())


def gptq_rows(found: list[Layer], planted: bool) -> Iterator[dict[str, Any]]:
    """A row for each setting and package: over the layers, on tokens seen and held out."""
    packages = {"llmcompressor": llm_compressor, "gptqmodel": gptq_model}
    for bits in (4, 3):
        for symmetric in (True, False):
            for act_order in (False, True):
                case = GptqCase(bits, symmetric, act_order)
                mine = [ours(layer, case) for layer in found]
                for package, quantise in packages.items():
                    other = [quantise(layer, case) for layer in found]
                    pairs = [
                        (output_error(layer, a, layer.seen), output_error(layer, b, layer.seen))
                        for layer, a, b in zip(found, mine, other, strict=True)
                    ]
                    later = [
                        output_error(layer, a, layer.held_out)
                        / output_error(layer, b, layer.held_out)
                        for layer, a, b in zip(found, mine, other, strict=True)
                    ]
                    yield {
                        "method": "GPTQ",
                        "package": package,
                        "bits": bits,
                        "symmetric": symmetric,
                        "act_order": act_order,
                        "outliers": planted,
                        "layers": len(found),
                        "ours": fmean([a for a, _ in pairs]),
                        "theirs": fmean([b for _, b in pairs]),
                        "ratio": fmean([a / b for a, b in pairs]),
                        "worst_ratio": max(a / b for a, b in pairs),
                        "held_out_ratio": fmean(later),
                    }


# -- AWQ, block by block: its scales reach from layer to layer ------------------------------------


def block_errors(model: Any, recorded: dict[str, Any]) -> list[float]:
    """Squared error of what each block adds, over its energy, on the fp32 model's inputs."""
    errors = []
    for i, block in enumerate(model.model.layers):
        (hidden, *rest), kwargs, expected = recorded[str(i)]
        out = block(hidden, *rest, **kwargs)
        difference = (out - expected).double()
        errors.append(
            float(difference.square().sum() / (expected - hidden).double().square().sum())
        )
    return errors


def ours_model(model: Any, config: AwqConfig, calibration: Tensor) -> Any:
    """A copy with the decoded weights."""
    model = copy.deepcopy(model)
    effllm.quantize_(
        model,
        config,
        lambda module, name: name != "lm_head",
        calibration=calibration,
        progress=False,
    )
    return dequantize_(model, torch.float32)


def llm_compressor_model(model: Any, bits: int, calibration: Tensor) -> Any:
    """The same by ``oneshot`` with its AWQ, whose scales are of activations and weights."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, index: None
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=False,
        strategy="group",
        group_size=GROUP,
        observer="memoryless_minmax",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration]
    model = copy.deepcopy(model)
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=4),
        recipe=[
            AWQModifier(),
            QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        ],
        pipeline="sequential",
    )
    return model


def awq_rows(
    model: Any, calibration: Tensor, held_out: Tensor, planted: bool
) -> Iterator[dict[str, Any]]:
    """A row for each number of bits; llm-compressor cuts no ranges, and ours is shown with both."""
    blocks = {str(i): block for i, block in enumerate(model.model.layers)}
    recorded = record(model, held_out, blocks)
    for bits in (4, 3):
        found = {
            "theirs": llm_compressor_model(model, bits, calibration),
            "ours": ours_model(
                model, AwqConfig(bits, Granularity.group(GROUP), clip=False), calibration
            ),
            "clipped": ours_model(model, AwqConfig(bits, Granularity.group(GROUP)), calibration),
        }
        errors = {name: block_errors(other, recorded) for name, other in found.items()}
        ratios = [a / b for a, b in zip(errors["ours"], errors["theirs"], strict=True)]
        yield {
            "method": "AWQ",
            "package": "llmcompressor",
            "bits": bits,
            "symmetric": False,
            "outliers": planted,
            "blocks": len(blocks),
            "ours": fmean(errors["ours"]),
            "ours_clipped": fmean(errors["clipped"]),
            "theirs": fmean(errors["theirs"]),
            "ratio": geometric_mean(ratios),
            "worst_ratio": max(ratios),
            "perplexity": {name: demo.perplexity(other, held_out) for name, other in found.items()},
        }


def table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    versions = " and ".join(f"{name} {version}" for name, version in result["packages"].items())
    lines = [
        "# GPTQ and AWQ beside public implementations",
        "",
        f"{versions}, on the demo model in fp32 with torch {result['torch']} on a CPU: the same",
        f"weights, {result['calibration_tokens']:,} tokens of training text to learn from, groups",
        "of 64 consecutive channels, damping 0.01, no cut ranges unless it says so. With outliers,",
        f"{OUTLIERS} channels after each norm are {SIZE} times as large, and the columns that they",
        "meet as much smaller. A ratio is our error over theirs. Made by `bench/agreement.py`.",
        "",
        "## GPTQ: squared error of a layer's output over its energy",
        "",
        f"Means over the {result['gptq'][0]['layers']} linear layers of three blocks; held out are",
        f"{result['held_out_tokens']:,} other tokens.",
        "",
        "| package | bits | zero points | act-order | outliers | ours | theirs | ratio | worst "
        "layer | ratio, held out |",
        "|---|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['package']} | {r['bits']} | {'no' if r['symmetric'] else 'yes'} | "
        f"{'yes' if r['act_order'] else 'no'} | {'yes' if r['outliers'] else 'no'} | "
        f"{r['ours']:.3e} | {r['theirs']:.3e} | {r['ratio']:.4f} | {r['worst_ratio']:.4f} | "
        f"{r['held_out_ratio']:.4f} |"
        for r in result["gptq"]
    ]
    lines += [
        "",
        "## AWQ: squared error of what a block adds to its input, over its energy",
        "",
        f"Means over all {result['awq'][0]['blocks']} blocks on the held-out tokens, each block on "
        "the unquantised model's",
        "inputs. llm-compressor leaves value heads that serve several query heads unscaled, runs",
        "the attention or MLP for each candidate, and cuts no ranges; ours judges candidates by",
        "the moments of the inputs alone.",
        "",
        "| bits | outliers | ours | theirs | ratio | worst block | ours, ranges cut | perplexity: "
        "ours | theirs | ours, ranges cut |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in result["awq"]:
        p = r["perplexity"]
        lines.append(
            f"| {r['bits']} | {'yes' if r['outliers'] else 'no'} | {r['ours']:.3e} | "
            f"{r['theirs']:.3e} | {r['ratio']:.3f} | {r['worst_ratio']:.3f} | "
            f"{r['ours_clipped']:.3e} | {p['ours']:.3f} | {p['theirs']:.3f} | {p['clipped']:.3f} |"
        )
    lines += ["", f"Perplexity in fp32: {result['perplexity']:.3f}."]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8, help="of calibration")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = demo.load(dtype=torch.float32)
    calibration = calibration_tokens(tokenizer, args.windows)
    held_out = demo.held_out_tokens(tokenizer, context=CONTEXT, limit=args.eval_tokens)
    names = ("llmcompressor", "gptqmodel")
    result: dict[str, Any] = {
        "packages": {name: importlib.metadata.version(name) for name in names},
        "torch": torch.__version__,
        "calibration_tokens": calibration.numel(),
        "held_out_tokens": held_out.numel(),
        "perplexity": demo.perplexity(model, held_out),
        "gptq": [],
        "awq": [],
    }
    outliers = demo.with_outliers(model, SIZE, OUTLIERS)
    for planted, one in ((False, model), (True, outliers)):
        found = list(layers(one, calibration, held_out))
        result["gptq"] += gptq_rows(found, planted)
        result["awq"] += awq_rows(one, calibration, held_out, planted)
    (args.out / "agreement.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "agreement.md").write_text(table(result))


if __name__ == "__main__":
    main()
