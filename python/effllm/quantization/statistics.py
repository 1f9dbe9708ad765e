"""Second moments of what linear layers get as inputs, summed over calibration data."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from effllm.quantization.hessian import inverse_factor


class InputStatistics:
    """Running sums over the tokens that enter a layer of K input channels.

    Attributes:
        hessian: ``[K, K]``, the sum of ``x x^T``: half the Hessian of the squared output error.
        magnitude: ``[K]``, the sum of ``|x|``.
        peak: ``[K]``, the largest ``|x|``.
        tokens: how many.
    """

    def __init__(
        self, k: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Zero tokens of ``k`` channels, summed in ``dtype`` (fp32 or fp64)."""
        self.hessian = torch.zeros(k, k, device=device, dtype=dtype)
        self.magnitude = torch.zeros(k, device=device, dtype=dtype)
        self.peak = torch.zeros_like(self.magnitude)
        self.tokens = 0
        self._factors: dict[tuple[float, tuple[int, ...]], Tensor] = {}

    def add(self, x: Tensor) -> None:
        """Adds the tokens ``x`` ``[..., K]`` of any float dtype.

        Raises ValueError if a sum is not finite afterwards: one such token spoils all.
        """
        x = x.detach().reshape(-1, x.shape[-1]).to(self.hessian.dtype)
        self.hessian.addmm_(x.T, x)
        # Without the absolute value, channels that change sign would look unused.
        size = x.abs()
        self.magnitude += size.sum(0)
        if x.shape[0]:
            self.peak = torch.maximum(self.peak, size.amax(0))
        self.tokens += x.shape[0]
        self._factors.clear()
        if not torch.isfinite(self.hessian.diagonal()).all():
            raise ValueError(
                "the calibration inputs hold NaN or infinity, or overflow when squared"
            )

    def scaled(self, scales: Tensor) -> InputStatistics:
        """Those of ``x / scales``, for scales ``[K]``."""
        scales = scales.to(self.hessian.dtype)
        found = copy.copy(self)
        found.hessian = (self.hessian / scales).div_(scales[:, None])
        found.magnitude, found.peak = self.magnitude / scales, self.peak / scales
        found._factors = {}
        return found

    @property
    def diagonal(self) -> Tensor:
        """``[K]``: the sum of the squares of each channel."""
        return self.hessian.diagonal()

    def inverse_factor(self, damping: float, order: Tensor) -> Tensor:
        """``hessian.inverse_factor`` for channels in ``order``; once for all layers with it."""
        key = (damping, tuple(order.tolist()))
        if key not in self._factors:
            self._factors[key] = inverse_factor(self.hessian[order][:, order], damping)
        return self._factors[key]

    def output_energy(self, weight: Tensor) -> float:
        """The sum of ``|weight @ x|**2`` over all tokens, for a weight ``[N, K]``."""
        weight = weight.to(self.hessian.dtype)
        return float(((weight @ self.hessian) * weight).sum(dtype=torch.float64))
