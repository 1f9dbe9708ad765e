"""GPTQ against the algorithm written out with an inverse after every column, and its purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.nn import Int4Linear
from effllm.quantization import GptqConfig, Granularity, LinearConfig
from effllm.quantization.hessian import inverse_factor
from effllm.quantization.statistics import InputStatistics

N, K = 24, 160


def correlated(tokens: int = 400, k: int = K) -> Tensor:
    """Inputs whose channels differ in size and are not independent, as those of a model are."""
    return torch.randn(tokens, k // 4) @ torch.randn(k // 4, k) * torch.randn(k).exp()


def statistics(x: Tensor, dtype: torch.dtype = torch.float64) -> InputStatistics:
    inputs = InputStatistics(x.shape[-1], dtype=dtype)
    inputs.add(x)
    return inputs


def output_error(x: Tensor, weight: Tensor, dense: Tensor) -> float:
    return float((x.double() @ (dense.double() - weight.double()).T).square().sum())


def reference(
    weight: Tensor, x: Tensor, config: GptqConfig, order: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales, in the order given, by Optimal Brain Surgeon: after each column the rest
    moves by ``-e / [H^-1]_jj * [H^-1]_j``, with H of the columns that are left (GPTQ, equation 2).

    Scales are of the groups when they are reached, symmetric, without clipping."""
    h = (x.double().T @ x.double())[order][:, order]
    h += config.damping * h.diagonal().mean() * torch.eye(len(h))
    w = weight.double()[:, order].clone()
    half = 2 ** (config.bits - 1)
    codes, scales = torch.zeros_like(w), []
    for j in range(w.shape[1]):
        if j % columns == 0:
            scales.append(w[:, j : j + columns].abs().amax(1) / (half - 0.5))
        code = torch.round(w[:, j] / scales[-1]).clamp(-half, half - 1)
        codes[:, j] = code + 8
        inverse = torch.linalg.inv(h[j:, j:])
        error = w[:, j] - code * scales[-1]
        w[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes, torch.stack(scales, 1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("granularity", [Granularity.channel(), Granularity.group(32)], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_those_of_the_definition(
    bits: int, granularity: Granularity, act_order: bool
) -> None:
    """160 columns: more than a block of 128, and a short one."""
    config = GptqConfig(bits, granularity, act_order=act_order, static_groups=False)
    _, columns = granularity.weight_tile(N, K)
    group = torch.arange(K) // columns
    ratios = []
    for _ in range(6):
        x, weight = correlated(), torch.randn(N, K)
        found = config.quantise(weight, statistics(x))
        order = torch.arange(K)
        if act_order:
            order = x.double().square().sum(0).argsort(descending=True, stable=True)
        codes, scales = reference(weight, x, config, order, columns)
        assert (found.perm is not None) == (act_order and columns < K)
        ours = found.codes if found.perm is not None else found.codes[:, order]
        if found.perm is not None:
            assert torch.equal(found.perm.long(), order)
        # One code that falls the other way in fp32 moves what comes after it.
        assert (ours != codes).double().mean() < 0.02
        assert ((found.scales.double() / scales - 1).abs() > 0.01).double().mean() < 0.03
        best = torch.empty_like(weight.double())
        best[:, order] = (codes - 8) * scales[:, group]
        ratios.append(output_error(x, weight, found.dense()) / output_error(x, weight, best))
    # Where such a code falls, the error of one weight is up to 4 % larger or smaller, of many the
    # same: over 24 weights the mean of these ratios was 0.9994.
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_static_groups_with_zero_points_are_those_of_the_definition(
    bits: int, act_order: bool
) -> None:
    """As above, with the ranges of the weights as they were: what other software calls static."""
    x, weight = correlated(), torch.randn(N, K)
    config = GptqConfig(bits, Granularity.group(32), symmetric=False, act_order=act_order)
    found = config.quantise(weight, statistics(x))
    order = torch.arange(K)
    if act_order:
        order = x.double().square().sum(0).argsort(descending=True, stable=True)
    h = (x.double().T @ x.double())[order][:, order]
    h += config.damping * h.diagonal().mean() * torch.eye(K)
    w, last = weight.double()[:, order].clone(), 2**bits - 1
    groups = weight.double().unflatten(1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / last
    zeros = torch.round(-low / scales)
    codes, dense = torch.zeros(N, K), torch.zeros(N, K, dtype=torch.float64)
    for j, channel in enumerate(order.tolist()):
        scale, zero = scales[:, channel // 32], zeros[:, channel // 32]
        code = (torch.round(w[:, j] / scale) + zero).clamp(0, last)
        codes[:, channel] = code
        dense[:, channel] = (code - zero) * scale
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - dense[:, channel]) / inverse[0, 0], inverse[0])
    assert found.perm is None
    assert found.zeros is not None
    assert torch.equal(found.zeros, zeros.to(torch.uint8))
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-5, atol=0)
    assert (found.codes != codes).double().mean() < 0.02
    assert output_error(x, weight, found.dense()) == pytest.approx(
        output_error(x, weight, dense), rel=0.02
    )


def test_factor_of_the_inverse() -> None:
    x = correlated(500, 48).double()
    hessian = x.T @ x
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "granularity",
    [Granularity.tensor(), Granularity.group(64), Granularity.block(5, 32)],
    ids=str,
)
def test_better_than_rounding(
    granularity: Granularity, act_order: bool, static_groups: bool, symmetric: bool
) -> None:
    x, weight = correlated(), torch.randn(N, K)
    ratios = []
    for bits in (2, 3, 4):
        for clip in (False, True):
            config = GptqConfig(
                bits,
                granularity,
                symmetric,
                clip,
                act_order=act_order,
                static_groups=static_groups,
            )
            found = config.quantise(weight, statistics(x))
            assert (found.perm is not None) == (
                act_order and not static_groups and granularity.kind != "tensor"
            )
            low, high = config.grid.codes
            assert low <= int(found.codes.min()) <= int(found.codes.max()) <= high
            plain = LinearConfig(bits, granularity, symmetric, clip).quantise(weight, None)
            ratios.append(
                output_error(x, weight, found.dense()) / output_error(x, weight, plain.dense())
            )
    assert max(ratios) < 1.1  # 2 bits without clipping leave little to make up for
    assert sum(ratios) / len(ratios) < 0.6


def test_static_groups_keep_the_scales_of_the_weights() -> None:
    x, weight = correlated(), torch.randn(N, K)
    config = GptqConfig(4, Granularity.group(32), symmetric=False)
    found = config.quantise(weight, statistics(x))
    plain = LinearConfig(4, Granularity.group(32), symmetric=False).quantise(weight, None)
    assert torch.equal(found.scales, plain.scales)
    assert found.zeros is not None
    assert plain.zeros is not None
    assert torch.equal(found.zeros, plain.zeros)


def test_act_order_is_no_worse_on_average() -> None:
    errors = {False: 0.0, True: 0.0}
    for _ in range(5):
        x, weight = correlated(), torch.randn(N, K)
        for act_order in errors:
            for static in (False, True):
                config = GptqConfig(3, act_order=act_order, static_groups=static)
                dense = config.quantise(weight, statistics(x)).dense()
                errors[act_order] += output_error(x, weight, dense)
    assert errors[True] < errors[False]


def test_layers_with_permuted_inputs() -> None:
    """Act-order with groups of permuted channels: the layer permutes what it gets."""
    x, linear = correlated(200), nn.Linear(K, N)
    config = GptqConfig(4, Granularity.group(32), static_groups=False)
    dense = config.quantise(linear.weight.detach(), statistics(x)).dense()
    codes = config.quantise(linear.weight.detach(), statistics(x))
    layer = codes.layer(linear)
    assert isinstance(layer, Int4Linear)
    assert layer.perm is not None
    torch.testing.assert_close(layer.weight, dense)
    expected = nn.functional.linear(x, dense, linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)


# -- inputs that break Cholesky -------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dead", "repeated", "one token", "none", "zero", "tiny"])
def test_singular_hessians(kind: str, dtype: torch.dtype, act_order: bool, damping: float) -> None:
    x, weight = torch.randn(300, K), torch.randn(N, K)
    weight[:, :32] = 0  # a group of zeros
    if kind == "dead":
        x[:, 40:43] = 0
    elif kind == "repeated":
        x[:, 50:] = x[:, 49:-1]
    elif kind == "one token":
        x = x[:1, None]  # [1, 1, K]: a batch of one token
    elif kind == "none":
        x = x[:0]
    else:
        x *= 0 if kind == "zero" else 1e-18
    config = GptqConfig(4, Granularity.group(32), act_order=act_order, damping=damping)
    found = config.quantise(weight, statistics(x, dtype))
    dense = found.dense()
    assert torch.isfinite(dense).all()
    plain = LinearConfig(4, Granularity.group(32)).quantise(weight, None)
    if kind in ("none", "zero"):
        assert torch.equal(dense, plain.dense())
    elif kind == "dead":
        # Rounded as they are: nothing is known of them, and they may be used some day.
        assert torch.equal(dense[:, 40:43], plain.dense()[:, 40:43])
    if x.numel():
        x = x.reshape(-1, K)
        assert output_error(x, weight, dense) <= output_error(x, weight, plain.dense())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"GptqConfig: damping must be in 0\.\.1, got -1"):
        GptqConfig(damping=-1)
    with pytest.raises(ValueError, match="GptqConfig needs calibration data, got calibration=None"):
        effllm.quantize_(nn.Sequential(nn.Linear(64, 64)), GptqConfig())
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(ValueError, match=r"layer '0': weight holds NaN or infinity"):
        effllm.quantize_(model, GptqConfig(), calibration=[torch.randn(4, 64)])
    with pytest.raises(ValueError, match="inputs hold NaN or infinity, or overflow when squared"):
        statistics(torch.full((2, 4), 1e30), torch.float32)
