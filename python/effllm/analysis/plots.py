"""Plots of what the analysis finds, with matplotlib (the extra ``effllm[plot]``).

Each draws into ``axes``, or into a new figure, and returns the axes; ``axes.figure.savefig`` writes
a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from effllm.quantization.report import LayerResult

if TYPE_CHECKING:
    from effllm.analysis.activations import ActivationError, Outliers
    from effllm.analysis.histogram import Histogram
    from effllm.analysis.weights import GranularityError, ScaleSearch


def _new_axes(columns: int, width: float) -> Any:
    """Axes side by side, or the only ones, in a new figure of ``width`` inches.

    Raises ImportError naming the extra without matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "effllm.analysis: plots need matplotlib: pip install 'effllm[plot]'"
        ) from error
    return pyplot.subplots(1, columns, figsize=(width, 4.2), layout="constrained")[1]


def _axes(axes: Any, title: str, x: str, y: str) -> Any:
    """The axes given, or new ones, with a title and names."""
    if axes is None:
        axes = _new_axes(1, 7)
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return axes


def plot_histogram(
    histograms: Mapping[str, Histogram],
    levels: Sequence[float] = (),
    axes: Any = None,
    *,
    title: str = "values",
) -> Any:
    """Densities on a logarithmic scale, with levels of a grid or codebook as vertical lines."""
    axes = _axes(axes, title, "value", "density")
    for level in levels:
        axes.axvline(level, color="0.75", linewidth=0.8, zorder=0)
    for name, found in histograms.items():
        axes.stairs(found.densities, found.edges, label=name)
    axes.set_yscale("log")
    axes.legend()
    return axes


def plot_outliers(outliers: Outliers, axes: Any = None, *, title: str = "outliers") -> Any:
    """Peaks of channels, largest first, and of tokens, with the lines beyond which they count."""
    axes = _axes(axes, title, "rank, as a part of all", "largest magnitude")
    for name, peaks, count, colour in (
        ("channels", outliers.channel_peaks, len(outliers.channels), "C0"),
        ("tokens", outliers.token_peaks, len(outliers.tokens), "C1"),
    ):
        ranked = sorted(peaks, reverse=True)
        places = [(i + 1) / len(ranked) for i in range(len(ranked))]
        axes.plot(places, ranked, color=colour, label=f"{name}: {count} of {len(ranked)} stand out")
        # The lower of two middle ones, as where outliers are counted.
        median = ranked[len(ranked) // 2]
        axes.axhline(outliers.threshold * median, color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    return axes


def plot_activation_errors(errors: Sequence[ActivationError], axes: Any = None) -> Any:
    """Error of the output over the size of the outlier channels, a line for each granularity."""
    title = "why outliers hurt: activations in 8 bits"
    axes = _axes(axes, title, "outlier channels are larger by", "squared error of the output")
    for granularity in dict.fromkeys(e.granularity for e in errors):
        mine = [e for e in errors if e.granularity == granularity]
        axes.plot([e.factor for e in mine], [e.error for e in mine], "o-", label=granularity)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(title="a scale for each")
    return axes


def plot_granularity(errors: Mapping[str, Sequence[GranularityError]], axes: Any = None) -> Any:
    """Error of a weight over its bits, a line for each name."""
    title = "what granularity buys"
    axes = _axes(axes, title, "bits per weight, scales included", "squared error of the weight")
    for name, found in errors.items():
        axes.plot([e.bits_per_weight for e in found], [e.error for e in found], "o-", label=name)
        for e in found:
            axes.annotate(
                e.granularity.removesuffix("()"),
                (e.bits_per_weight, e.error),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_yscale("log")
    axes.legend()
    return axes


def plot_scale_search(search: ScaleSearch, axes: Any = None) -> Any:
    """Left, the error by exponent; right, the errors of channels without scales and with the best.

    ``axes`` are two.
    """
    if axes is None:
        axes = _new_axes(2, 11)
    left = _axes(axes[0], "AWQ's search", "exponent of the scales", "squared error of the output")
    left.plot(search.exponents, search.errors, "o-")
    best = search.exponents[search.best]
    left.plot(best, search.errors[search.best], "*", color="C3", markersize=15, label="best")
    left.legend()
    right = _axes(
        axes[1],
        "what the scales do",
        "mean magnitude of an input channel",
        "its part of the error",
    )
    for name, found in zip(("no scales", f"exponent {best:g}"), search.channel_errors, strict=True):
        right.plot(search.magnitudes, found, ".", markersize=4, label=name)
    right.set_xscale("log")
    right.set_yscale("log")
    right.legend()
    return axes


def plot_layer_errors(errors: Mapping[str, Sequence[LayerResult]], axes: Any = None) -> Any:
    """Relative error of each layer's output, a line for each method."""
    title = "error by layer and method"
    axes = _axes(axes, title, "layer", "squared error of the output")
    for name, found in errors.items():
        axes.plot([layer.output_error for layer in found], ".-", linewidth=1, label=name)
    names = [layer.name for layer in next(iter(errors.values()), ())]
    prefix = len(commonprefix(names)) if len(names) > 1 else 0  # noqa: RUF071
    shown = range(0, len(names), max(1, len(names) // 32))
    axes.set_xticks(shown, [names[i][prefix:] for i in shown], rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.legend()
    return axes
