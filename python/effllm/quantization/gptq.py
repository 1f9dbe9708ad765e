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

    if static_groups or columns >= k:
        scales, zeros = fit_groups(original, importance)
        groups = (order // columns).tolist()

        def grid_of(j: int, rest: Tensor) -> tuple[Tensor, Tensor]:
            return scales[:, groups[j]], zeros[:, groups[j]]
    else:
        shape = (n, -(-k // columns))
        scales, zeros = original.new_empty(shape), original.new_empty(shape)

        def grid_of(j: int, rest: Tensor) -> tuple[Tensor, Tensor]:
            g = j // columns
            if j % columns == 0:
                # With the columns as the errors so far have left them.
                group = rest[:columns].T.contiguous()
                found = fit_groups(group, importance[order[j : j + columns]])
                scales[:, g : g + 1], zeros[:, g : g + 1] = found
            return scales[:, g], zeros[:, g]

    factor = inputs.inverse_factor(damping, order)
    codes = _round_columns(original[:, order], factor, grid, grid_of).to(torch.uint8)
    perm = None
    if act_order and columns < k and not static_groups:
        perm = order.int()
    else:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    stored_zeros = None if grid.symmetric else zeros.to(torch.uint8)
    return UniformCodes(codes, scales.to(weight.dtype), stored_zeros, columns, perm)


def _round_columns(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    grid_of: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Codes, fp32 ``[N, K]``, of the columns in their order.

    ``grid_of(j, rest)`` gives scales and zeros ``[N]`` of column j, from ``rest``: the rows of the
    transposed weight from j to the end of the block, as they are when j is reached.
    """
    work = weight.T.contiguous()  # columns as rows: each is one run of memory
    codes = torch.empty_like(work)
    k = work.shape[0]
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block, errors = work[start:end], torch.empty_like(work[start:end])
        for j in range(end - start):
            scales, zeros = grid_of(start + j, block[j:])
            code = grid.encode(block[j], scales, zeros)
            codes[start + j] = code
            row = factor[start + j, start + j : end]
            errors[j] = (block[j] - (code - zeros) * scales) / row[0]
            block[j + 1 :].addr_(row[1:], errors[j], alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()
