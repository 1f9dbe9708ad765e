"""LinearConfig against loops over single weights, and its clipping against a dense search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import effllm
from effllm.nn import Int4Linear, Int8Linear
from effllm.quantization import AwqConfig, GptqConfig, Granularity, LinearConfig

GRANULARITIES = [
    Granularity.tensor(),
    Granularity.channel(),
    Granularity.group(32),
    Granularity.block(5, 64),
]


def reference(
    tile: np.ndarray, bits: int, symmetric: bool, ratio: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of the weights that share a scale, one after the other, in float64."""
    low, high = min(tile.min(), 0.0) * ratio, max(tile.max(), 0.0) * ratio
    if symmetric:
        first, zero = 8 - 2 ** (bits - 1), 8
        scale = max(-low, high) / (2 ** (bits - 1) - 0.5)
    else:
        first = 0
        scale = (high - low) / (2**bits - 1)
        zero = min(max(round(-low / scale), 0), 2**bits - 1)
    last = first + 2**bits - 1
    codes = [min(max(round(value / scale) + zero, first), last) for value in tile]
    return np.array(codes), (np.array(codes) - zero) * scale


def tiles_of(granularity: Granularity, n: int, k: int) -> list[tuple[slice, slice]]:
    rows, columns = granularity.weight_tile(n, k)
    return [
        (slice(i, i + rows), slice(j, j + columns))
        for i in range(0, n, rows)
        for j in range(0, k, columns)
    ]


@pytest.mark.parametrize(
    "granularity", [Granularity.tensor(), Granularity.channel(), Granularity.group(128)], ids=str
)
def test_eight_bits(granularity: Granularity) -> None:
    """256 codes around 0, in a layer of their own, which leaves inputs as they are."""
    weight = torch.randn(12, 300)
    found = LinearConfig(8, granularity).quantise(weight, None)
    for tile in tiles_of(granularity, 12, 300):
        values = weight[tile].double()
        scale = values.abs().max() / 127.5
        wanted = (values / scale).round().clamp(-128, 127) * scale
        assert (found.dense()[tile] - wanted).abs().max() < 1.01 * scale
        assert (found.dense()[tile] - values).abs().max() < 0.51 * scale
    layer = found.layer(nn.Linear(300, 12))
    assert isinstance(layer, Int8Linear)
    assert torch.equal(layer.weight, found.dense())
    clipped = LinearConfig(8, granularity, clip=True).quantise(weight, None)
    assert (clipped.dense() - weight).norm() < (found.dense() - weight).norm()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LinearConfig, {"symmetric": False}, "8 bits are of symmetric=True, got False"),
        (AwqConfig, {}, "8 bits are of symmetric=True, got False"),
        (LinearConfig, {"inputs": Granularity.token()}, r"8 bits must be None, got token\(\)"),
        (LinearConfig, {"granularity": Granularity.group(64)}, r"channel\(\) or group\(128\)"),
        (GptqConfig, {"granularity": Granularity.block(4, 128)}, r"got block\(4, 128\)"),
        (GptqConfig, {"static_groups": False}, "act_order"),
    ],
)
def test_eight_bits_that_no_kernel_has(
    config: type[LinearConfig], options: dict[str, object], message: str
) -> None:
    channel = {"granularity": Granularity.channel()}
    with pytest.raises(ValueError, match=f"{config.__name__}: .*{message}"):
        config(8, **channel | options)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_codes_and_values(granularity: Granularity, symmetric: bool, bits: int) -> None:
    weight = torch.randn(12, 100)
    found = LinearConfig(bits, granularity, symmetric).quantise(weight, None)
    assert (found.zeros is None) == symmetric
    for tile in tiles_of(granularity, 12, 100):
        values = weight[tile].double().flatten().numpy()
        codes, dense = reference(values, bits, symmetric)
        # Of two codes equally near, rounding errors choose: distances are compared, not codes.
        ours = found.dense()[tile].flatten().double().numpy()
        np.testing.assert_allclose(abs(ours - values), abs(dense - values), rtol=0, atol=2e-6)
        assert (found.codes[tile].flatten().numpy() != codes).sum() <= 1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_clipping_is_close_to_the_best(
    granularity: Granularity, symmetric: bool, bits: int
) -> None:
    weight = torch.randn(10, 128)
    weight[3, 70] = 9.0  # an outlier makes a range that is better cut
    clipped = LinearConfig(bits, granularity, symmetric, clip=True).quantise(weight, None)
    plain = LinearConfig(bits, granularity, symmetric).quantise(weight, None)
    for tile in tiles_of(granularity, 10, 128):
        values = weight[tile].double().flatten().numpy()
        best = min(
            ((reference(values, bits, symmetric, ratio / 250)[1] - values) ** 2).sum()
            for ratio in range(10, 251)
        )
        error = float((clipped.dense()[tile] - weight[tile]).double().square().sum())
        assert error <= 1.02 * best
        assert error <= float((plain.dense()[tile] - weight[tile]).double().square().sum())


def test_layers_multiply_by_what_the_codes_say() -> None:
    x = torch.randn(3, 100)
    for granularity in GRANULARITIES:
        for bits in (2, 3, 4):
            linear = nn.Linear(100, 70)
            config = LinearConfig(bits, granularity, symmetric=False, clip=True)
            dense = config.quantise(linear.weight.detach(), None).dense()
            model = nn.Sequential(linear)
            report = effllm.quantize_(model, config)
            assert isinstance(model[0], Int4Linear)
            torch.testing.assert_close(model[0].weight, dense)
            torch.testing.assert_close(model(x), nn.functional.linear(x, dense, linear.bias))
            weight = linear.weight.detach()
            error = (dense - weight).square().sum() / weight.square().sum()
            assert report.layers[0].weight_error == pytest.approx(float(error), rel=1e-4)
            assert (report.layers[0].name, report.layers[0].bits) == ("0", bits)


def test_finer_is_better() -> None:
    """Group before channel before tensor, more bits before fewer, clipped before plain."""
    weight = torch.randn(96, 256) * torch.rand(96, 1).exp() * torch.randn(1, 256).mul(0.3).exp()

    def error(bits: int, granularity: Granularity, clip: bool = False) -> float:
        found = LinearConfig(bits, granularity, clip=clip).quantise(weight, None)
        return float((found.dense() - weight).square().sum())

    for bits in (2, 3, 4):
        for clip in (False, True):
            fine_to_coarse = [
                Granularity.group(32),
                Granularity.group(128),
                Granularity.channel(),
                Granularity.tensor(),
            ]
            errors = [error(bits, granularity, clip) for granularity in fine_to_coarse]
            assert errors == sorted(errors)
    for granularity in GRANULARITIES:
        errors = [error(bits, granularity) for bits in (4, 3, 2)]
        assert errors == sorted(errors)


def test_patterns_mix_configs() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(64, 64)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)}),
            "head": nn.Linear(64, 64),
        }
    )
    fine = LinearConfig(4, Granularity.group(32))
    coarse = LinearConfig(3, Granularity.channel(), symmetric=False)
    mixture = {"*.down": None, "*.v": fine, "attention.*": coarse, "mlp.*": coarse}
    report = effllm.quantize_(model, mixture)
    assert [(layer.name, layer.bits, layer.granularity) for layer in report.layers] == [
        ("attention.q", 3, "channel()"),
        ("attention.v", 4, "group(32)"),
        ("mlp.up", 3, "channel()"),
    ]
    assert report.skipped == {"mlp.down": "config", "head": "config"}
    assert type(model["head"]) is type(model["mlp"]["down"]) is nn.Linear
    assert "attention.v  linear      4  group(32)" in str(report)
    with pytest.raises(ValueError, match=r"the pattern 'mlp\.gate' matches none of the linear"):
        effllm.quantize_(model, {"mlp.gate": coarse})
    with pytest.raises(ValueError, match=r"config\['head'\] must be a config or None, got 4"):
        effllm.quantize_(model, {"head": 4})  # type: ignore[dict-item]
