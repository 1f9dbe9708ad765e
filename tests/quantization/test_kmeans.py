"""k-means against the optimum by dynamic programming, and the layers that it gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.nn import Lut4Linear
from effllm.quantization import Granularity, KMeansConfig, LinearConfig
from effllm.quantization.kmeans import kmeans
from effllm.quantization.statistics import InputStatistics


def optimum(values: np.ndarray, mass: np.ndarray, size: int) -> float:
    """The smallest weighted squared error of `size` clusters: intervals of the sorted values."""
    order = values.argsort()
    x, m = values[order].astype(float), mass[order].astype(float)
    count = len(x)

    def cost(a: int, b: int) -> float:
        if m[a:b].sum() == 0:
            return 0.0
        mean = (m[a:b] * x[a:b]).sum() / m[a:b].sum()
        return float((m[a:b] * (x[a:b] - mean) ** 2).sum())

    costs = [[cost(a, b) if a < b else 0.0 for b in range(count + 1)] for a in range(count + 1)]
    best = [0.0] + [np.inf] * count
    for _ in range(size):
        best = [min(best[a] + costs[a][b] for a in range(b + 1)) for b in range(count + 1)]
    return best[count]


def error(values: Tensor, mass: Tensor, codebook: Tensor) -> float:
    distance = (values.double()[:, None] - codebook.double()).square().amin(1)
    return float((mass.double() * distance).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_near_the_optimum(weighted: bool) -> None:
    values = torch.randn(12, 40)
    mass = torch.rand(12, 40).square() if weighted else torch.ones(12, 40)
    found, best = 0.0, 0.0
    codebooks = kmeans(values, 4, mass if weighted else None)
    for row in range(12):
        ours = error(values[row], mass[row], codebooks[row])
        least = optimum(values[row].numpy(), mass[row].numpy(), 4)
        assert ours >= least * (1 - 1e-5)
        found, best = found + ours, best + least
    assert found <= 1.1 * best


def test_entries_are_the_means_of_their_clusters() -> None:
    values = torch.randn(6, 200)
    for row, codebook in zip(values, kmeans(values, 8), strict=True):
        assert codebook.tolist() == sorted(codebook.tolist())
        cluster = (row[:, None] - codebook).abs().argmin(1)
        for i in range(8):
            torch.testing.assert_close(row[cluster == i].mean(), codebook[i], rtol=1e-2, atol=1e-2)


def test_separate_clusters_are_found_exactly() -> None:
    centres = torch.tensor([-3.0, -1.0, 0.0, 4.0])
    values = centres.repeat(10) + torch.tensor([-1, 1]).repeat_interleave(20) * 2**-6
    assert torch.equal(kmeans(values[None], 4), centres[None])


def test_few_and_equal_values() -> None:
    values = torch.tensor([[0.0] * 5, [2.0] * 5, [1.0, 1.0, 1.0, 1.0, -1.0]])
    codebooks = kmeans(values, 8)
    assert torch.isfinite(codebooks).all()
    for row, codebook in zip(values, codebooks, strict=True):
        assert error(row, torch.ones(5), codebook) == 0
    # Channels that are always zero have no say, unless all are.
    assert error(values[2], torch.ones(5), kmeans(values[2:], 2, torch.zeros(1, 5))[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (Granularity.tensor(), (16,)),
        (Granularity.channel(), (70, 16)),
        (Granularity.group(64), (70, 2, 16)),
    ],
    ids=["tensor", "channel", "group"],
)
def test_layers(
    granularity: Granularity, shape: tuple[int, ...], bits: int, dtype: torch.dtype
) -> None:
    linear = nn.Linear(100, 70).to(dtype)
    weight = linear.weight.detach().float()
    model = nn.Sequential(linear)
    config = KMeansConfig(bits, granularity)
    report = effllm.quantize_(model, config)
    layer = model[0]
    assert isinstance(layer, Lut4Linear)
    assert (layer.codebook.shape, layer.codebook.dtype, layer.scales) == (shape, dtype, None)
    codes = effllm.ops.int4_unpack(layer.qweight, 70, 100)
    assert int(codes.max()) < 1 << bits
    rows, columns = granularity.weight_tile(70, 100)
    tables = layer.codebook.detach().float().view(-(-70 // rows), -1, 16)
    total = 0.0
    for i in range(0, 70, rows):
        for j in range(0, 100, columns):
            block = weight[i : i + rows, j : j + columns].flatten()
            total += error(block, torch.ones(len(block)), tables[i // rows, j // columns])
    assert report.layers[0].weight_error == pytest.approx(
        total / float(weight.square().sum()), rel=1e-3
    )
    x = torch.randn(3, 100).to(dtype)
    expected = nn.functional.linear(x.float(), layer.weight.float(), linear.bias.float())
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(x).float(), expected, **rounding)


def test_a_short_last_group_is_as_good_as_alone() -> None:
    weight = torch.randn(5, 100) + 3  # the zeros that pad would be far from all of it
    codebook = KMeansConfig(3, Granularity.group(64)).quantise(weight, None).codebook
    alone = KMeansConfig(3, Granularity.channel()).quantise(weight[:, 64:].contiguous(), None)
    assert torch.equal(codebook[:, 1], alone.codebook)


def test_weighted_by_the_inputs() -> None:
    """Channels with large inputs are rounded better, and so the output is."""
    linear = nn.Linear(128, 48, bias=False)
    x = torch.randn(500, 128) * torch.randn(128).exp()
    inputs = InputStatistics(128)
    inputs.add(x)
    weight = linear.weight.detach()
    errors = {}
    for weighted in (False, True):
        config = KMeansConfig(3, Granularity.channel(), weighted=weighted)
        assert config.needs_calibration == weighted
        dense = config.quantise(weight, inputs).dense()
        errors[weighted] = float((x @ (dense - weight).T).square().sum())
    assert errors[True] < 0.8 * errors[False]
    with pytest.raises(ValueError, match="KMeansConfig needs calibration"):
        effllm.quantize_(nn.Sequential(linear), KMeansConfig(weighted=True))


def test_better_than_linear() -> None:
    """Per channel, also than linear codes with the best clipping."""
    weight = torch.randn(64, 256)
    for bits in (2, 3, 4):
        ours = KMeansConfig(bits, Granularity.channel()).quantise(weight, None).dense()
        linear = LinearConfig(bits, Granularity.channel(), symmetric=False, clip=True)
        other = linear.quantise(weight, None).dense()
        assert (ours - weight).square().sum() < 0.95 * (other - weight).square().sum()
    with pytest.raises(ValueError, match=r"KMeansConfig: granularity .* got block\(2, 64\)"):
        KMeansConfig(4, Granularity.block(2, 64))
