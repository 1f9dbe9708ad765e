"""A tiny random Llama, fp32 on the CPU, that several test folders share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
"""For configs of any family: GQA with groups of 2; weights large enough to have opinions."""


def llama_config(**changes: Any) -> Any:
    """``TINY`` with 3 layers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    options = TINY | {"num_hidden_layers": 3, "max_position_embeddings": 256}
    return transformers.LlamaConfig(**(options | changes))


@pytest.fixture
def llama() -> Any:
    config = llama_config()
    import transformers  # there, or llama_config would have skipped

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def using(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword of a cache: ``past_key_values``, which later transformers call ``cache``."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


IDS = torch.tensor([[1, 5, 9, 2, 70, 33, 8, 21]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out
