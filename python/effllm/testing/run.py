"""Calls ops on cases and checks what comes back: where contract tests and benchmarks both start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm import _load
from effllm.testing import hostile
from effllm.testing.case import Args, Case, Kwargs
from effllm.testing.compare import assert_result


def as_tuple(result: Any) -> tuple[Any, ...]:
    """What an op returned, as a tuple: of none, of one, or as it is."""
    if result is None:
        return ()
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def tensors_of(arguments: Any) -> list[Tensor]:
    """All tensors among arguments, those in lists included, in order."""
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def schema_of(op: str) -> Any:
    """The schema of ``torch.ops.effllm.<op>``."""
    return getattr(_load.ops, op).default._schema


def bind(schema: Any, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """The arguments by the schema's names; those left out are not in it."""
    names = [argument.name for argument in schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def results_of(
    function: Callable[..., Any], schema: Any, args: Args, kwargs: Kwargs
) -> tuple[Tensor, ...]:
    """Call an op: the arguments that its schema says it writes, then what it returns."""
    returned = as_tuple(function(*args, **kwargs))
    bound = bind(schema, args, kwargs)
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return (*tensors_of([bound.get(name) for name in written]), *returned)


def check_values(function: Callable[..., Any], case: Case, device: str | torch.device) -> None:
    """Hold an op to its case's reference, by the tolerance law, on poisoned memory.

    Args:
        function: the public function, or something that takes its arguments and does its work.
        case: the problem.
        device: where the op runs.

    Raises:
        AssertionError: as ``effllm.testing.compare`` words it.
    """
    schema = schema_of(case.op)
    args, kwargs = case.make(device)
    references = as_tuple(case.reference(*args, **kwargs))
    baselines = as_tuple(case.baseline(*args, **kwargs))
    if schema.is_mutable:
        # Made anew: references and baselines may share memory with the arguments they were given.
        args, kwargs = case.make(device)
    with hostile.nan_allocations():
        results = results_of(function, schema, args, kwargs)
    assert len(results) == len(references) == len(baselines), (
        f"{case.op}: {len(results)} results, {len(references)} references, "
        f"{len(baselines)} baselines"
    )
    for index, trio in enumerate(zip(results, references, baselines, strict=True)):
        assert_result(*trio, cosine="gemm" in case.op, name=f"{case.op} result {index}")
