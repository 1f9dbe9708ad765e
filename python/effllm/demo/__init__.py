"""Two small language models of Python code that ship with effllm, and the text to judge them by.

`model_path()` and `draft_path()` are Hugging Face folders (Llama architecture, one tokenizer).
`held_out_tokens()` reads evaluation text from the running Python; `perplexity()` scores a model
on it. `README.md` beside this file says how the models were trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .corpus import held_out_text, held_out_tokens
from .evaluate import mean_nll, perplexity, with_outliers

__all__ = [
    "draft_path",
    "held_out_text",
    "held_out_tokens",
    "load",
    "mean_nll",
    "medusa_path",
    "model_path",
    "perplexity",
    "training_record",
    "with_outliers",
]

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    """Folder of the main model (about 8M parameters) in Hugging Face layout."""
    return _FOLDER / "model"


def draft_path() -> Path:
    """Folder of the draft model (about 1M parameters) in Hugging Face layout."""
    return _FOLDER / "draft"


def medusa_path() -> Path:
    """Folder of Medusa heads for the main model; see `effllm.speculative.MedusaHeads`."""
    return _FOLDER / "medusa"


def training_record() -> dict[str, Any]:
    """What the training run wrote: seed, corpus, steps, loss curves, perplexities, versions."""
    record: dict[str, Any] = json.loads((_FOLDER / "training_record.json").read_text("utf-8"))
    return record


def load(
    folder: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> tuple[Any, Any]:
    """Loads (model, tokenizer) from a demo folder, by default the main model, in eval mode.

    `options` go to `AutoModelForCausalLM.from_pretrained`, `attn_implementation="effllm"` say.
    Raises `ImportError` naming the extra if `transformers` is missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "effllm.demo.load needs transformers: pip install 'effllm[hf]'"
        ) from error
    folder = str(folder if folder is not None else model_path())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
