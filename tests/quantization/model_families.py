"""Tiny random models of several architectures, with channels of different size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import llama_config
from torch import nn

IDS = torch.arange(4 * 24).view(4, 24) * 37 % 97


def spread_out(model: Any) -> Any:
    """Norms that give channels of different size, as those of trained models do."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0, 1.5)
            parameter.data.exp_()
    return model


FAMILIES = {
    "Llama": {"attention_bias": True},
    "Llama, as many value heads": {"num_key_value_heads": 4},
    "Qwen3": {},
    "Gemma2": {},
    "GPTNeoX": {},
    "OPT": {},
}


def make(family: str) -> Any:
    """A tiny model of random weights; only Llama and its like have the config of the others."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    name = family.split(",")[0]
    torch.manual_seed(1)
    if name in ("GPTNeoX", "OPT"):
        sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}
        more = {
            "GPTNeoX": {"intermediate_size": 96},
            "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
        }
        config = getattr(transformers, f"{name}Config")(
            **sizes, num_attention_heads=4, max_position_embeddings=64, **more[name]
        )
    else:
        options = llama_config().to_dict()
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range")
        options = {key: options[key] for key in (*kept, *heads)} | {"pad_token_id": 0}
        config = getattr(transformers, f"{name}Config")(**(options | FAMILIES[family]))
    return spread_out(getattr(transformers, f"{name}ForCausalLM")(config).eval())
