"""The triangular factor of an inverse Hessian, by which GPTQ passes errors on."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_DAMPING = 1e4


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with ``U^T U`` the inverse of the damped Hessian ``[K, K]``; fp32.

    ``damping`` times the mean of the diagonal is added to the diagonal, ten times more whenever the
    sum is still not positive definite. Computed in fp64, from the Cholesky factor in reversed
    order: ``H = V V^T`` with V upper triangular, and U is the inverse of V.

    Raises:
        ValueError: no damping up to 10,000 times the mean helps.
    """
    hessian = hessian.double()
    hessian = (hessian + hessian.T).div_(2).flip(0, 1)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    live = diagonal[~dead]
    mean = live.mean() if live.numel() else torch.ones_like(diagonal).mean()
    plain = torch.where(dead, mean, diagonal)
    while damping <= _MAX_DAMPING:
        diagonal.copy_(plain + damping * mean)
        reverse, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper = reverse.flip(0, 1)
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float()
        damping = max(10 * damping, 1e-6)
    raise ValueError(
        f"the Hessian of its inputs is not positive definite, even damped by {_MAX_DAMPING:g} "
        "times its mean diagonal"
    )
