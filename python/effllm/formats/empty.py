"""transformers models without weights, to be filled from a file, and what a filled one gets."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from effllm.formats.checkpoint import CheckpointError
from effllm.formats.report import LoadReport


def import_extra(name: str) -> Any:
    """A module of the extra [hf]. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"effllm.load needs {name}: pip install 'effllm[hf]'") from error


def empty_model(config: Any, source: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A causal language model with parameters on the meta device; its buffers are real.

    Args:
        config: of transformers, read from the file ``source``.
        source: what to call it in the message.
        dtype: of the parameters.
        options: for ``from_config`` of transformers.

    Raises:
        CheckpointError: the config makes no model.
    """
    auto, accelerate = import_extra("transformers").AutoModelForCausalLM, import_extra("accelerate")
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:  # whatever a model's constructor does with wrong numbers
        raise CheckpointError(
            f"{source}: transformers cannot make a model of it: {type(error).__name__}: {error}"
        ) from error
    # Outside of that context, which makes a new parameter at every assignment.
    model.tie_weights()
    return model


def finish_model(model: Any, report: LoadReport) -> Any:
    """The model in evaluation mode, with its report, and ``save_pretrained`` refused if need be."""
    # Imported here, as it imports transformers.
    from effllm.integrations.quantizer import refuse_save_pretrained

    refuse_save_pretrained(model)
    model.effllm_report = report
    return model.eval()
