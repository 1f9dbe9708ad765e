"""Pictures of what quantisation does to the demo model, by ``effllm.analysis``.

    python bench/analysis.py      # bench/results/analysis-*.png, in a minute

The model is bundled, in fp32; its activations are those of training text. It is too small to have
outliers as large as those of models of billions of parameters; where they matter, they are planted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from quality import RESULTS, calibration_tokens

from effllm import demo
from effllm.analysis import (
    activation_errors,
    find_outliers,
    granularity_errors,
    histogram,
    layer_errors,
    layer_inputs,
    plot_activation_errors,
    plot_granularity,
    plot_histogram,
    plot_layer_errors,
    plot_outliers,
    plot_scale_search,
    scale_search,
)
from effllm.quantization import AwqConfig, GptqConfig, Granularity, KMeansConfig, LinearConfig

LAYER = "model.layers.3.mlp.down_proj"


def pictures(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Axes by the name of the file."""
    from matplotlib import pyplot

    layer = model.get_submodule(LAYER)
    weight = layer.weight.detach()
    x = layer_inputs(model, tokens, lambda module, name: name == LAYER)[LAYER]

    _, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    group = weight[0, :64]
    codes = LinearConfig(4, Granularity.group(64), False).quantise(group[None], None)
    book = KMeansConfig(4, Granularity.group(64)).quantise(group[None], None).codebook
    steps = (torch.arange(16) - codes.zeros.float()).flatten() * codes.scales.float().item()
    plot_histogram(
        {"weights": histogram(weight)},
        steps.tolist(),
        axes[0],
        title="weights of a layer, and the levels of one group",
    )
    for level in book.flatten().tolist():
        axes[0].axvline(level, ymax=0.06, color="C3", linewidth=1)
    axes[0].plot([], [], color="0.75", label="linear levels, 4 bits")
    axes[0].plot([], [], color="C3", label="levels of k-means")
    axes[0].legend()
    plot_histogram({"inputs": histogram(x)}, axes=axes[1], title="what the layer gets")

    methods = {
        "linear": LinearConfig(3, symmetric=False),
        "linear, clipped": LinearConfig(3, symmetric=False, clip=True),
        "AWQ": AwqConfig(3),
        "GPTQ": GptqConfig(3, symmetric=False),
        "k-means": KMeansConfig(3, Granularity.group(64)),
    }
    errors = layer_errors(
        model, methods, tokens, lambda module, name: name != "lm_head", progress=False
    )
    return {
        "histograms": axes[0],
        "outliers": plot_outliers(find_outliers(x), title=f"inputs of {LAYER}"),
        "activations": plot_activation_errors(
            activation_errors(
                x, weight, [Granularity.tensor(), Granularity.token(), Granularity.group(64)]
            )
        ),
        "granularity": plot_granularity(
            {f"{bits} bits": granularity_errors(weight, bits) for bits in (4, 3)}
        ),
        "awq": plot_scale_search(scale_search(weight, x, 3))[0],
        "layers": plot_layer_errors(errors),
    }


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    model, tokenizer = demo.load(dtype=torch.float32)
    for name, axes in pictures(model, calibration_tokens(tokenizer, 4)).items():
        axes.figure.savefig(args.out / f"analysis-{name}.png", dpi=80)


if __name__ == "__main__":
    main()
