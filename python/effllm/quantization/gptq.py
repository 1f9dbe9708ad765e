"""GPTQ: codes column by column, each error made up for by the columns that follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effllm.quantization.granularity import Granularity
from effllm.quantization.method import UniformCodes
from effllm.quantization.round_to_nearest import check_weight, per_row
from effllm.quantization.statistics import InputStatistics
from effllm.quantization.uniform import Grid, fit, squared_error, to_tiles

# Columns between two updates of everything to the right; a multiple of all group sizes.
_BLOCK = 128


def quantise_gptq(
    weight: Tensor,
    inputs: InputStatistics,
    grid: Grid,
    granularity: Granularity,
    *,
    clip: bool,
    act_order: bool,
    static_groups: bool,
    damping: float,
) -> UniformCodes:
    """Codes of a weight ``[N, K]`` whose squared output error over the inputs is small.

    After Frantar et al., GPTQ (arXiv:2210.17323), algorithm 1: with ``U^T U`` the inverse of the
    damped Hessian and U upper triangular, the error of column j over ``U[j, j]`` times row j of U
    is taken off the columns to the right, in blocks of 128 so that most work is a matrix product.

    Channels that were 0 in every token are rounded as they are; so is all if there was no token.
    Arguments as in ``GptqConfig``. Raises ValueError for a weight that is no finite matrix, and if
    no damping makes the Hessian positive definite.
    """
    check_weight(weight)
    n, k = weight.shape
    rows, columns = granularity.weight_tile(n, k)
    order = torch.arange(k, device=weight.device)
    if act_order:
        order = inputs.diagonal.to(weight.device).argsort(descending=True, stable=True)
    original = weight.float()
    importance = inputs.diagonal.to(weight.device, torch.float32)

    def fit_groups(values: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros, fp32 ``[N, groups]``, of consecutive columns."""
        tiles = to_tiles(values, rows, columns)
        error = None
        if clip:
            # Dead channels count a little: theirs may be all that a group has.
            masses = (mass + 1e-3 * importance.mean() + 1e-30).expand(values.shape)
            masses = to_tiles(masses, rows, columns)

            def error(difference: Tensor) -> Tensor:
                return squared_error(difference * masses.sqrt())

        scales, zeros = fit(tiles, grid, weight.dtype, error)
        return per_row(scales, rows, n), per_row(zeros, rows, n)

    static = static_groups or columns >= k
    groups = (order if static else torch.arange(k, device=weight.device)) // columns
    first, last = grid.codes
    # Of each group: scales, and how many steps below and above zero its codes reach.
    table = original.new_empty(-(-k // columns), 3, n)
    rows_of = [group.unbind() for group in table]

    def found(values: Tensor, mass: Tensor) -> Tensor:
        scales, zeros = fit_groups(values, mass)
        return torch.stack([scales, first - zeros, last - zeros]).permute(2, 0, 1)

    if static:
        table.copy_(found(original, importance))
    group_of = groups.tolist()

    def grid_of(j: int, rest: Tensor) -> tuple[Tensor, ...]:
        g = group_of[j]
        if not static and j % columns == 0:
            # With the columns as the errors so far have left them.
            group = rest[:columns].T.contiguous()
            table[g : g + 1] = found(group, importance[order[j : j + columns]])
        return rows_of[g]

    factor = inputs.inverse_factor(damping, order)
    steps = _round_columns(original[:, order], factor, grid_of)
    scales, zeros = table[:, 0].T.contiguous(), first - table[:, 1].T
    codes = (steps + zeros[:, groups]).to(torch.uint8)
    perm = None
    if act_order and not static:
        perm = order.int()
    else:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    stored_zeros = None if grid.symmetric else zeros.to(torch.uint8)
    return UniformCodes(codes, scales.to(weight.dtype), stored_zeros, columns, perm, grid.bits)


def _round_columns(
    weight: Tensor, factor: Tensor, grid_of: Callable[[int, Tensor], tuple[Tensor, ...]]
) -> Tensor:
    """Codes less their zero points, fp32 ``[N, K]``, of the columns in their order.

    ``grid_of(j, rest)`` gives scales and bounds of the result, ``[N]`` each, for column j, from
    ``rest``: the rows of the transposed weight from j to the end of the block, as they are when j
    is reached. Six small operations are all that a column costs, and nothing waits for a GPU.
    """
    work = weight.T.contiguous()  # columns as rows: each is one run of memory
    steps = torch.empty_like(work)
    k = work.shape[0]
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block, errors = work[start:end], torch.empty_like(work[start:end])
        inner = factor[start:end, start:end]
        diagonal = inner.diagonal().unbind()
        for j, (column, step, error) in enumerate(
            zip(block, steps[start:end], errors, strict=True)
        ):
            scales, low, high = grid_of(start + j, block[j:])
            torch.div(column, scales, out=step).round_().clamp_(low, high)
            torch.addcmul(column, step, scales, value=-1, out=error).div_(diagonal[j])
            block[j + 1 :].addr_(inner[j, j + 1 :], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return steps.T.contiguous()
