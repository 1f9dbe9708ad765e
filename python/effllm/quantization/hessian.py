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
    hessian = (hessian + hessian.T) / 2
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    live = diagonal[~dead]
    mean = live.mean() if live.numel() else torch.ones_like(diagonal).mean()
    hessian = torch.where(torch.diag(dead), mean, hessian)
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while damping <= _MAX_DAMPING:
        reverse, failed = torch.linalg.cholesky_ex((hessian + damping * mean * identity).flip(0, 1))
        if not failed:
            upper = reverse.flip(0, 1)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float()
        damping = max(10 * damping, 1e-6)
    raise ValueError(
        f"the Hessian of its inputs is not positive definite, even damped by {_MAX_DAMPING:g} "
        "times its mean diagonal"
    )
