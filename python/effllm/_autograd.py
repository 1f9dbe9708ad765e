"""Backward passes that refuse, so that a missing gradient is an error and never a silent None."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} is an inference op without a gradient; call it under torch.no_grad() or "
        "detach its inputs"
    )


def refuse_backward(op: OpOverload) -> None:
    """Register a backward for a functional inference op that raises and says what to do."""

    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse(op.name())

    torch.library.register_autograd(op.name(), backward)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, name: str) -> Tensor:
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse(ctx.name)


def refusing_backward(result: Tensor, op: OpOverload) -> Tensor:
    """The result of an op that also mutates, for which torch takes no backward: with one."""
    return _Refusal.apply(result, op.name()) if result.requires_grad else result
