"""Backward passes that refuse, so that a missing gradient is an error and never a silent None."""

from typing import Any

import torch
from torch._ops import OpOverload


def refuse_backward(op: OpOverload) -> None:
    """Register a backward for a functional inference op that raises and says what to do."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op.name()} is an inference op without a gradient; call it under torch.no_grad() or "
            "detach its inputs"
        )

    torch.library.register_autograd(op.name(), backward)
