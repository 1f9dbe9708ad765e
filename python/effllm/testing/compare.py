"""The tolerance law: one rule for every op instead of a constant per test.

An op may err from the float64 reference at most twice as much as the same maths in plain PyTorch
at the op's own precision, plus one rounding step. Whoever finds a result inexact thereby learns
whether the kernel or the number format is to blame.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 2.0
"""How many times the baseline's error an op may show."""

ATOL = {
    torch.float64: 1e-14,
    torch.float32: 4e-6,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
"""Allowed on top, in units of the row's size, or of the element's where that is larger: one step of
the format. float32 gets the steps that another order of summation costs over some thousand terms.
"""

COSINE_ATOL = {torch.float64: 1e-15, torch.float32: 1e-9, torch.float16: 1e-6, torch.bfloat16: 4e-5}
"""Allowed on top of twice the baseline's ``1 - cosine``: about half the square of ``ATOL``."""


def assert_close_to_reference(
    actual: Tensor,
    reference: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cosine: bool = False,
    name: str = "out",
) -> None:
    """Assert that ``actual`` is as close to ``reference`` as the tolerance law demands.

    Errors are measured relative to the size (root mean square) of their row, the last dimension, so
    that one row of outliers does not excuse errors in the others.

    Args:
        actual: what the op returned.
        reference: the exact result in float64, same shape.
        baseline: plain PyTorch's result at the op's precision, same shape.
        dtype: the precision that sets the rounding step; by default that of ``actual``.
        cosine: also bound ``1 - cosine`` of the whole tensors: catches errors too small for the
            element-wise bound but present everywhere. For GEMMs.
        name: what to call the tensor in the failure message.

    Raises:
        AssertionError: another shape, an inf or NaN in other places than the reference has them, or
            an error over the bound; says where, both values, and both errors.
    """
    dtype = dtype or actual.dtype
    _assert_same_shape(actual, reference, name)
    _assert_same_shape(baseline, reference, f"{name}: baseline")
    exact = reference.detach().double()
    # A value beyond the format's range has to come out as inf: rounding decides, not the kernel.
    rounded = exact.to(actual.dtype).double()
    found = actual.detach().to(exact.device, torch.float64)
    plain = baseline.detach().to(exact.device, torch.float64)
    _assert_same_special_values(found, rounded, name)
    if exact.numel() == 0:
        return

    finite = rounded.isfinite() & exact.isfinite()
    # inf and NaN agree by now; zeros in all three take them out of the sums below.
    exact, found = exact.where(finite, 0.0), found.where(finite, 0.0)
    plain = plain.where(finite & plain.isfinite(), exact)
    scale = _row_scale(exact)
    error = (found - exact).abs() / scale
    baseline_error = (plain - exact).abs() / scale
    step = ATOL[dtype] * (exact.abs() / scale).clamp(min=1.0)
    allowed = SLACK * baseline_error.max().item() + step
    worst = int((error - allowed).argmax())
    if error.flatten()[worst].item() > allowed.flatten()[worst].item():
        raise AssertionError(
            f"{name}: error {error.flatten()[worst]:.3e} of the row's size at "
            f"{_position(worst, exact)}: got {found.flatten()[worst]:.9g}, reference "
            f"{exact.flatten()[worst]:.9g}, baseline {plain.flatten()[worst]:.9g} (the baseline's "
            f"largest error is {baseline_error.max():.3e}, allowed {allowed.flatten()[worst]:.3e}; "
            f"{int((error > allowed).sum())} of {error.numel()} elements are over)"
        )
    if cosine:
        _assert_same_direction(found / scale, exact / scale, plain / scale, dtype, name)


def assert_equal(actual: Tensor, expected: Tensor, *, name: str = "out") -> None:
    """Assert that two tensors agree in dtype, shape and every value; NaN equals NaN.

    Args:
        actual: what the op returned.
        expected: what it should have returned.
        name: what to call the tensor in the failure message.

    Raises:
        AssertionError: says how many elements differ, and the first with both values.
    """
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype must be {expected.dtype}, got {actual.dtype}"
    )
    _assert_same_shape(actual, expected, name)
    found, wanted = actual.detach(), expected.detach().to(actual.device)
    differs = found != wanted
    if found.is_floating_point():
        differs &= ~(found.isnan() & wanted.isnan())
    if differs.any():
        first = int(differs.flatten().nonzero()[0])
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, the first at "
            f"{_position(first, found)}: got {found.flatten()[first].item()}, expected "
            f"{wanted.flatten()[first].item()}"
        )


def assert_result(
    actual: Tensor, reference: Tensor, baseline: Tensor, *, cosine: bool = False, name: str = "out"
) -> None:
    """Compare one result as its reference asks: to the bit if the reference has the result's own
    dtype, by the tolerance law if it is float64. Raises AssertionError as the two above do."""
    if reference.dtype == actual.dtype:
        assert_equal(actual, reference, name=name)
    else:
        assert reference.dtype == torch.float64, (
            f"{name}: the reference must be float64 or {actual.dtype}, got {reference.dtype}"
        )
        assert_close_to_reference(actual, reference, baseline, cosine=cosine, name=name)


def one_minus_cosine(a: Tensor, b: Tensor) -> float:
    """``1 - cosine`` of two tensors taken as vectors, computed without cancellation in float64."""
    a, b = a.flatten().double(), b.flatten().double()
    return 0.5 * (a / a.norm() - b / b.norm()).square().sum().item()


def _assert_same_shape(tensor: Tensor, reference: Tensor, name: str) -> None:
    assert tensor.shape == reference.shape, (
        f"{name}: shape must be {list(reference.shape)}, got {list(tensor.shape)}"
    )


def _assert_same_special_values(found: Tensor, reference: Tensor, name: str) -> None:
    for kind, mask, wanted in (
        ("NaN", found.isnan(), reference.isnan()),
        ("+inf", found == float("inf"), reference == float("inf")),
        ("-inf", found == float("-inf"), reference == float("-inf")),
    ):
        differs = mask != wanted
        if differs.any():
            first = int(differs.flatten().nonzero()[0])
            raise AssertionError(
                f"{name}: {kind} in {int(mask.sum())} elements, the reference has it in "
                f"{int(wanted.sum())}; first difference at {_position(first, found)}: got "
                f"{found.flatten()[first]:.9g}, reference {reference.flatten()[first]:.9g}"
            )


def _row_scale(exact: Tensor) -> Tensor:
    rows = exact.unsqueeze(0) if exact.dim() == 0 else exact
    size = rows.square().mean(-1, keepdim=True).sqrt()
    # A row that cancelled to almost nothing still carries the rounding of its terms: it is judged
    # by the size of an ordinary row. The last floor only keeps all-zero results from 0 / 0.
    floor = max(size.flatten().median().item() / 4, 1e-30)
    return size.clamp(min=floor).reshape(() if exact.dim() == 0 else size.shape)


def _assert_same_direction(
    found: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, name: str
) -> None:
    if min(found.norm(), exact.norm(), plain.norm()) == 0:
        return  # no direction; the element-wise bound has spoken
    deviation = one_minus_cosine(found, exact)
    baseline_deviation = one_minus_cosine(plain, exact)
    allowed = SLACK * baseline_deviation + COSINE_ATOL[dtype]
    assert deviation <= allowed, (
        f"{name}: 1 - cosine is {deviation:.3e}, the baseline's {baseline_deviation:.3e}, "
        f"allowed {allowed:.3e}"
    )


def _position(flat: int, tensor: Tensor) -> list[int]:
    position = []
    for size in reversed(tensor.shape):
        position.append(flat % size)
        flat //= size
    return position[::-1]
