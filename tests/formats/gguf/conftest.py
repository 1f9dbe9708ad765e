"""Models with as many ways to be wrong as tiny ones can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import one_thread

__all__ = ["make_llama", "make_model", "one_thread"]


@pytest.fixture
def make_llama(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that most tests take."""
    return lambda **changes: make_model("llama", **changes)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Of a model type. 6 heads over 2 key-value heads: with the wrong count of heads in a
    permutation, or with the ratio of the two in place of the second, other rows come out."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

    def make(model_type: str, **changes: Any) -> Any:
        options = {
            "vocab_size": 101,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **(options | changes))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones hide errors
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model.eval()

    return make
