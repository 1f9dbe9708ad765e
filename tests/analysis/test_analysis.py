"""What the analysis counts and measures, against values written out; and that plots show it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effllm import analysis
from effllm.quantization import (
    AwqConfig,
    GptqConfig,
    Granularity,
    KMeansConfig,
    LinearConfig,
)

TENSOR, TOKEN, CHANNEL = Granularity.tensor(), Granularity.token(), Granularity.channel()


# -- histograms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_histogram_counts_every_value_once(dtype: torch.dtype) -> None:
    values = torch.randn(40, 50).to(dtype)
    found = analysis.histogram(values, 7)
    assert len(found.edges) == 8
    assert (found.edges[0], found.edges[-1]) == (float(values.min()), float(values.max()))
    for i, count in enumerate(found.counts):
        low, high = found.edges[i : i + 2]
        inside = [low <= v < high or (i == 6 and v == high) for v in values.flatten().tolist()]
        assert sum(inside) == count
    assert sum(found.counts) == 2000
    assert found.outside == 0


def test_histogram_with_limits() -> None:
    values = torch.tensor([-3.0, 0.0, 0.25, 0.5, 1.0, 1.0, 7.0])
    found = analysis.histogram(values, 2, (0.0, 1.0))
    assert (found.edges, found.counts, found.outside) == ([0.0, 0.5, 1.0], [2, 3], 2)
    assert found.densities == [2 / (7 * 0.5), 3 / (7 * 0.5)]
    equal = analysis.histogram(torch.full((3,), 2.0), 5)
    assert (equal.edges[0], equal.edges[-1], sum(equal.counts)) == (1.5, 2.5, 3)


@pytest.mark.parametrize(
    ("values", "bins", "limits", "message"),
    [
        (torch.empty(0), 5, None, "must be finite, and at least one, got 0"),
        (torch.tensor([1.0, math.nan]), 5, None, "got 2, of which 1 are NaN or inf"),
        (torch.tensor([1.0, -math.inf]), 5, None, "got 2, of which 1 are NaN or inf"),
        (torch.ones(3), 0, None, r"at least one bin and ascending limits, got 0"),
        (torch.ones(3), 5, (2.0, 2.0), r"ascending limits, got 5, 2.0 and 2.0"),
    ],
)
def test_histogram_errors(
    values: Tensor, bins: int, limits: tuple[float, float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        analysis.histogram(values, bins, limits)


# -- activations ----------------------------------------------------------------------------------


def test_outliers_are_those_planted() -> None:
    x = torch.rand(3, 20, 16) + 0.5
    x[:, :, 5] *= -40
    x[:, :, 11] *= 90
    x[1, 7] = 9.5  # token 27
    found = analysis.find_outliers(x, 6)
    assert found.channels == [11, 5]
    assert found.tokens == []  # all tokens have the large channels
    flat = x.reshape(60, 16)
    assert found.channel_peaks == flat.abs().amax(0).tolist()
    assert found.token_peaks == flat.abs().amax(1).tolist()
    small = torch.rand(60, 16) + 0.5
    small[27] = 20
    assert analysis.find_outliers(small).tokens == [27]
    assert analysis.find_outliers(torch.zeros(4, 4)).channels == []
    with pytest.raises(ValueError, match=r"x must be \[..., K\] and not empty, got \[0, 4\]"):
        analysis.find_outliers(torch.empty(0, 4))


def test_layer_inputs_are_what_layers_got() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4))
    batches = [torch.randn(2, 3, 6), torch.randn(1, 4, 6)]
    found = analysis.layer_inputs(model, batches)
    first = torch.cat([b.reshape(-1, 6) for b in batches])
    assert list(found) == ["0", "3"]
    assert torch.equal(found["0"], first)
    torch.testing.assert_close(found["3"], model[0](first).relu().detach())
    assert model.training
    assert not model[0]._forward_pre_hooks
    assert list(analysis.layer_inputs(model, batches, lambda m, name: name == "3")) == ["3"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", [TENSOR, TOKEN, CHANNEL, Granularity.group(4)], ids=str)
def test_rounding_of_activations(granularity: Granularity, bits: int) -> None:
    """Element by element, with the scale of all elements that share one."""
    x = torch.randn(5, 10)
    x[2] = 0
    found = analysis.round_activations(x, granularity, bits)
    shared = {
        "tensor": lambda i, j: x,
        "token": lambda i, j: x[i],
        "channel": lambda i, j: x[:, j],
        "group": lambda i, j: x[i, j - j % 4 : j - j % 4 + 4],
    }[granularity.kind]
    for i in range(5):
        for j in range(10):
            scale = float(shared(i, j).abs().max()) / (2 ** (bits - 1) - 1)
            expected = round(float(x[i, j]) / scale) * scale if scale else 0.0
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)


def test_outliers_hurt_where_they_share_a_scale() -> None:
    x, weight = torch.randn(200, 64), torch.randn(32, 64)
    grains = [TENSOR, TOKEN, Granularity.group(32), CHANNEL]
    found = analysis.activation_errors(x, weight, grains, factors=(1, 8, 64))
    errors = {(e.granularity, e.factor): e.error for e in found}
    for granularity in grains[:3]:
        mine = [errors[str(granularity), f] for f in (1.0, 8.0, 64.0)]
        assert mine == sorted(mine)
        assert mine[2] > 50 * mine[0]
    for factor in (1.0, 8.0, 64.0):
        by_size = [errors[str(g), factor] for g in grains[:3]]
        assert by_size == sorted(by_size, reverse=True)
    # With a scale for each channel there is nothing to suffer from.
    assert errors["channel()", 64.0] == pytest.approx(errors["channel()", 1.0], rel=1e-3)


# -- weights --------------------------------------------------------------------------------------


def test_finer_scales_cost_bits_and_save_error() -> None:
    weight = torch.randn(48, 256) * torch.randn(48, 1).exp()
    found = analysis.granularity_errors(weight, 3)
    assert [e.granularity for e in found] == [
        "tensor()",
        "channel()",
        "group(128)",
        "group(64)",
        "group(32)",
    ]
    sizes = [3 + 19 / (48 * 256), 3 + 19 / 256, 3 + 19 / 128, 3 + 19 / 64, 3 + 19 / 32]
    assert [e.bits_per_weight for e in found] == pytest.approx(sizes)
    assert [e.error for e in found] == sorted((e.error for e in found), reverse=True)
    dense = LinearConfig(3, Granularity.group(32), False).quantise(weight, None).dense()
    expected = float((dense - weight).square().sum() / weight.square().sum())
    assert found[-1].error == pytest.approx(expected, rel=1e-5)
    # A short last group has a scale as well.
    (short,) = analysis.granularity_errors(torch.ones(2, 40), 4, [Granularity.group(32)])
    assert short.bits_per_weight == pytest.approx(4 + 4 * 20 / 80)
    assert analysis.granularity_errors(torch.zeros(4, 64))[0].error == 0


def test_scale_search_measures_outputs() -> None:
    x = torch.randn(300, 64) * torch.randn(64).mul(1.5).exp()
    weight = torch.randn(24, 64)
    found = analysis.scale_search(weight, x, 3, Granularity.group(32), steps=10)
    assert found.exponents == [step / 10 for step in range(11)]
    energy = (x.double() @ weight.double().T).square().sum()
    for exponent, error in zip(found.exponents, found.errors, strict=True):
        scales = x.abs().mean(0) ** exponent
        scales /= (scales.max() * scales.min()).sqrt()
        dense = LinearConfig(3, Granularity.group(32), False).quantise(weight * scales, None)
        difference = dense.dense().double() / scales - weight
        expected = float((x.double() @ difference.T).square().sum() / energy)
        assert error == pytest.approx(expected, rel=1e-3)
    assert found.best == found.errors.index(min(found.errors)) > 0
    torch.testing.assert_close(torch.tensor(found.magnitudes), x.abs().mean(0))
    # Large channels gain, small ones lose.
    before, after = (torch.tensor(errors) for errors in found.channel_errors)
    order = x.abs().mean(0).argsort()
    assert after[order[-8:]].sum() < before[order[-8:]].sum()
    assert after[order[:8]].sum() > before[order[:8]].sum()


METHODS = {
    "linear": LinearConfig(3, Granularity.group(32), False),
    "AWQ": AwqConfig(3, Granularity.group(32), clip=False),
    "GPTQ": GptqConfig(3, Granularity.group(32), False),
    "k-means": KMeansConfig(3, Granularity.group(32)),
}


def two_layers() -> tuple[nn.Sequential, list[Tensor]]:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return model, [torch.randn(100, 64) * torch.randn(64).exp()]


def test_errors_by_layer_and_method() -> None:
    model, batches = two_layers()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = analysis.layer_errors(model, METHODS, batches, progress=False)
    assert list(found) == list(METHODS)
    assert all([r.name for r in results] == ["0", "2"] for results in found.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    inputs = analysis.layer_inputs(model, batches)
    for i, name in enumerate(("0", "2")):
        weight, x = model.get_submodule(name).weight.detach(), inputs[name]
        dense = METHODS["linear"].quantise(weight, None).dense()
        expected = float((x @ (dense - weight).T).square().sum() / (x @ weight.T).square().sum())
        assert found["linear"][i].output_error == pytest.approx(expected, rel=1e-3)
        # Scales count, although in this model no other layer could take those of the first.
        searched = analysis.scale_search(weight, x, 3, Granularity.group(32))
        assert found["AWQ"][i].output_error <= min(searched.errors) * 1.001
        assert found["GPTQ"][i].output_error < found["linear"][i].output_error
    with pytest.raises(ValueError, match="needs a config, and a linear layer to quantise"):
        analysis.layer_errors(model, {}, batches)
    with pytest.raises(ValueError, match="needs a config, and a linear layer to quantise"):
        analysis.layer_errors(model, METHODS, batches, lambda module, name: False)


# -- plots ----------------------------------------------------------------------------------------


def test_plots_show_the_data(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs the extra effllm[plot]")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, batches = two_layers()
    weight, x = model[0].weight.detach(), batches[0]
    found = analysis.histogram(weight, 30)
    axes = analysis.plot_histogram({"weights": found}, [-0.1, 0.0, 0.1], title="of a layer")
    assert axes.get_title() == "of a layer"
    assert axes.patches[0].get_data().values.tolist() == found.densities
    assert len(axes.lines) == 3

    outliers = analysis.find_outliers(x, 3)
    axes = analysis.plot_outliers(outliers)
    assert axes.lines[0].get_ydata()[0] == max(outliers.channel_peaks)
    assert f"channels: {len(outliers.channels)} of 64" in axes.get_legend().texts[0].get_text()

    grains = {"4 bits": analysis.granularity_errors(weight)}
    axes = analysis.plot_granularity(grains)
    assert list(axes.lines[0].get_ydata()) == [e.error for e in grains["4 bits"]]
    axes = analysis.plot_activation_errors(analysis.activation_errors(x, weight))
    assert [line.get_label() for line in axes.lines] == ["tensor()", "token()"]

    search = analysis.scale_search(weight, x)
    left, right = analysis.plot_scale_search(search)
    assert list(left.lines[0].get_ydata()) == search.errors
    assert list(right.lines[1].get_ydata()) == search.channel_errors[1]

    errors = analysis.layer_errors(model, METHODS, batches, progress=False)
    _, own = pyplot.subplots()
    axes = analysis.plot_layer_errors(errors, own)
    assert axes is own
    assert [line.get_label() for line in axes.lines] == list(METHODS)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    axes.figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    pyplot.close("all")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    search = analysis.ScaleSearch([0.0], [0.1], [1.0], ([0.1], [0.1]), 0)
    for plot in (
        lambda: analysis.plot_granularity({}),
        lambda: analysis.plot_scale_search(search),
    ):
        with pytest.raises(ImportError, match=r"need matplotlib: pip install 'effllm\[plot\]'"):
            plot()


def test_the_extra_is_not_imported() -> None:
    """Data without plots must come without matplotlib."""
    check = "import sys, effllm.analysis; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
