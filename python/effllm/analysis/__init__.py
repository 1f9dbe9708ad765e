"""Looking at what quantisation does: data as plain records, and plots of them."""

from effllm.analysis.activations import (
    ActivationError,
    Outliers,
    activation_errors,
    find_outliers,
    layer_inputs,
    round_activations,
)
from effllm.analysis.histogram import Histogram, histogram
from effllm.analysis.plots import (
    plot_activation_errors,
    plot_granularity,
    plot_histogram,
    plot_layer_errors,
    plot_outliers,
    plot_scale_search,
)
from effllm.analysis.weights import (
    GranularityError,
    ScaleSearch,
    granularity_errors,
    layer_errors,
    scale_search,
)

__all__ = [
    "ActivationError",
    "GranularityError",
    "Histogram",
    "Outliers",
    "ScaleSearch",
    "activation_errors",
    "find_outliers",
    "granularity_errors",
    "histogram",
    "layer_errors",
    "layer_inputs",
    "plot_activation_errors",
    "plot_granularity",
    "plot_histogram",
    "plot_layer_errors",
    "plot_outliers",
    "plot_scale_search",
    "round_activations",
    "scale_search",
]
