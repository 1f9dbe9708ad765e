"""A Llama of random weights over a paged cache, of any size, made on the device in a moment.

What ``effllm.generate`` asks of a model, without transformers: the same matrix multiplications, and
the fused operations that the package has for the rest. Random weights have no opinions: the two
likeliest tokens of a random head are often equal to within rounding, so that greedy text would hang
on the order of sums. The head is therefore the embeddings of a permutation's predecessors: the
likeliest token by far is the permutation's image of the last one, whatever the layers add.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effllm.cache import PagedContext
from effllm.nn import PagedAttention

# What 32 layers add to an embedding is then some three times as large as that, of deviation 1.
WEIGHT_STD = 0.01


@dataclass
class Shape:
    """The sizes of a Llama, by the names that transformers gives them: also the model's config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 4096
    _attn_implementation: str = "effllm"

    def get_text_config(self, decoder: bool) -> Shape:
        """Itself: there are no other modalities."""
        return self


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128256)
TINY = Shape(256, 640, 2, 4, 2, 64, 1024)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, dim = shape.hidden_size, shape.head_dim
        of_q, of_kv = shape.num_attention_heads * dim, shape.num_key_value_heads * dim
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.q_proj = nn.Linear(hidden, of_q, bias=False)
        self.k_proj = nn.Linear(hidden, of_kv, bias=False)
        self.v_proj = nn.Linear(hidden, of_kv, bias=False)
        self.o_proj = nn.Linear(of_q, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate_proj = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, hidden, bias=False)
        self.attention = PagedAttention(shape.num_attention_heads, shape.num_key_value_heads, dim)

    def forward(
        self, x: Tensor, context: PagedContext, layer: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + self.o_proj(self.attention(q, k, v, context, layer, rotary=rotary))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LlamaShaped(nn.Module):
    """A causal language model as ``effllm.generate`` calls it."""

    _can_compile_fullgraph = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = shape
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.cos = self.sin = torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Of its weights, as is the dtype."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def get_output_embeddings(self) -> nn.Module:
        """What hidden states are given to."""
        return self.lm_head

    def set_attn_implementation(self, name: str) -> None:
        """There is only one."""
        self.config._attn_implementation = name

    def forward(
        self, input_ids: Tensor, effllm: PagedContext, logits_to_keep: Tensor | int, **rest: Any
    ) -> Any:
        """Logits [1, R, V]; ``rest`` is what the context knows as well."""
        x = self.embed_tokens(input_ids[0])
        for index, layer in enumerate(self.layers):
            x = layer(x, effllm, index, (self.cos, self.sin))
        x = self.norm(x)
        if isinstance(logits_to_keep, Tensor):
            x = x[logits_to_keep]
        return SimpleNamespace(logits=self.lm_head(x)[None])


@torch.no_grad()
def make(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> LlamaShaped:
    """A model of random weights, the same for a seed and kind of device."""
    with torch.device("meta"):
        model = LlamaShaped(shape).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            std = 1.0 if name == "embed_tokens.weight" else WEIGHT_STD
            parameter.normal_(0.0, std, generator=generator)
    follows = torch.randperm(shape.vocab_size, generator=generator, device=device)
    model.lm_head.weight[follows] = model.embed_tokens.weight
    half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angles = torch.outer(
        torch.arange(shape.max_position_embeddings, device=device), 500000.0**-half
    )
    model.cos, model.sin = angles.cos(), angles.sin()
    return model
