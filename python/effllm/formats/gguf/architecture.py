"""What differs between the models that can be read: one table, from which names and shapes of all
tensors follow.

Other models that llama.cpp stores as the architecture "llama" (Mistral, SmolLM, Yi, ...) are
covered where LlamaForCausalLM computes the same.

Source: llama.cpp, src/models and conversion.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Of each block: name in the file, in the model, output and input size as `_sizes` calls them.
_PROJECTIONS = (
    ("attn_q", "self_attn.q_proj", "q", "hidden"),
    ("attn_k", "self_attn.k_proj", "kv", "hidden"),
    ("attn_v", "self_attn.v_proj", "kv", "hidden"),
    ("attn_output", "self_attn.o_proj", "hidden", "q"),
    ("ffn_gate", "mlp.gate_proj", "inner", "hidden"),
    ("ffn_up", "mlp.up_proj", "inner", "hidden"),
    ("ffn_down", "mlp.down_proj", "hidden", "inner"),
)
_BLOCK_NORMS = (
    ("attn_norm", "input_layernorm", "hidden"),
    ("ffn_norm", "post_attention_layernorm", "hidden"),
)
_HEAD_NORMS = (
    ("attn_q_norm", "self_attn.q_norm", "head"),
    ("attn_k_norm", "self_attn.k_norm", "head"),
)
# Gemma 2 has norms before and after; "ffn_norm" is that before the MLP, as in all others.
_GEMMA2_NORMS = (
    ("attn_norm", "input_layernorm", "hidden"),
    ("post_attention_norm", "post_attention_layernorm", "hidden"),
    ("ffn_norm", "pre_feedforward_layernorm", "hidden"),
    ("post_ffw_norm", "post_feedforward_layernorm", "hidden"),
)


@dataclass(frozen=True)
class Field:
    """A field of the config that some architectures alone have.

    Attributes:
        config: its name in the Hugging Face config.
        key: the metadata key, without the architecture.
        default: what llama.cpp takes where the key is missing; its type is that of the field.
    """

    config: str
    key: str
    default: int | float


@dataclass(frozen=True)
class Architecture:
    """How one family of models is stored.

    Attributes:
        name: ``general.architecture``, which is also the prefix of the keys.
        model_type: of the Hugging Face config.
        permuted: rows of queries and keys are in ggml's order, see ``to_hf_rows``.
        biased: projections that always have a bias.
        bias_fields: boolean fields of the config, and the start of the names of the projections
            that they give a bias to.
        norms: of each block: (name in the file, in the model, size).
        norm_offset: norm weights in the file are larger by it.
        activation: the field of the config, and the one value that llama.cpp computes.
        fields: further ones.
    """

    name: str
    model_type: str
    permuted: bool = False
    biased: tuple[str, ...] = ()
    bias_fields: tuple[tuple[str, str], ...] = ()
    norms: tuple[tuple[str, str, str], ...] = _BLOCK_NORMS
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")
    fields: tuple[Field, ...] = ()

    def has_bias(self, projection: str, config: Mapping[str, Any]) -> bool:
        """Whether a projection (as it is called in the file) has a bias."""
        return projection in self.biased or any(
            projection.startswith(prefix) and bool(config.get(field))
            for field, prefix in self.bias_fields
        )

    def read_bias_fields(self, names: Container[str]) -> dict[str, bool]:
        """What the names of a file's tensors say of ``bias_fields``."""
        return {
            field: any(
                f"blk.0.{name}.bias" in names
                for name, *_ in _PROJECTIONS
                if name.startswith(prefix)
            )
            for field, prefix in self.bias_fields
        }


_ATTENTION_BIAS = ("attention_bias", "attn")
_TANH_GELU = "gelu_pytorch_tanh"

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(
            "llama",
            "llama",
            permuted=True,
            bias_fields=(_ATTENTION_BIAS, ("mlp_bias", "ffn")),
        ),
        Architecture("qwen2", "qwen2", biased=("attn_q", "attn_k", "attn_v")),
        Architecture(
            "qwen3", "qwen3", bias_fields=(_ATTENTION_BIAS,), norms=_BLOCK_NORMS + _HEAD_NORMS
        ),
        Architecture("gemma", "gemma", norm_offset=1.0, activation=("hidden_act", _TANH_GELU)),
        Architecture(
            "gemma2",
            "gemma2",
            norms=_GEMMA2_NORMS,
            norm_offset=1.0,
            activation=("hidden_activation", _TANH_GELU),
            fields=(
                Field("sliding_window", "attention.sliding_window", 4096),
                Field("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
                Field("final_logit_softcapping", "final_logit_softcapping", 30.0),
            ),
        ),
    )
}
"""By the name in the file."""

_MODEL_TYPES = {row.model_type: row for row in ARCHITECTURES.values()}
_MODEL_TYPES["mistral"] = ARCHITECTURES["llama"]


def architecture_of(model_type: object) -> Architecture | None:
    """The row of a Hugging Face model type; None for those that cannot be stored."""
    return _MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None


@dataclass(frozen=True)
class Slot:
    """One tensor of a model.

    Attributes:
        gguf: its name in the file.
        module, parameter: its name in the Hugging Face model.
        shape: in PyTorch's order.
        linear: the weight of an ``nn.Linear``, not of an embedding or a norm.
        heads: rows are in another order in the file, head by head; 0 if they are not.
        offset: what the values in the file are larger by.
    """

    gguf: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    linear: bool = False
    heads: int = 0
    offset: float = 0.0


def slots(config: Mapping[str, Any]) -> Iterator[Slot]:
    """Every tensor that a model of this config has, in the order of its layers.

    ``config`` has the fields that ``read_config`` returns.
    """
    row = _MODEL_TYPES[config["model_type"]]
    sizes = _sizes(config)
    vocab = (config["vocab_size"], sizes["hidden"])
    norm = row.norm_offset
    heads = {}
    if row.permuted:
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    yield Slot("token_embd.weight", "model.embed_tokens", "weight", vocab)
    for index in range(config["num_hidden_layers"]):
        block, layer = f"blk.{index}", f"model.layers.{index}"
        for name, module, out, k in _PROJECTIONS:
            module, shape, order = f"{layer}.{module}", (sizes[out], sizes[k]), heads.get(name, 0)
            yield Slot(f"{block}.{name}.weight", module, "weight", shape, True, order)
            if row.has_bias(name, config):
                yield Slot(f"{block}.{name}.bias", module, "bias", shape[:1], False, order)
        for name, module, size in row.norms:
            module = f"{layer}.{module}"
            yield Slot(f"{block}.{name}.weight", module, "weight", (sizes[size],), offset=norm)
    yield Slot("output_norm.weight", "model.norm", "weight", (sizes["hidden"],), offset=norm)
    if not config["tie_word_embeddings"]:
        yield Slot("output.weight", "lm_head", "weight", vocab, True)


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    head = config["head_dim"]
    return {
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "head": head,
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
    }


# A rotary embedding turns pairs of rows of a head, in D/2 planes. Hugging Face pairs row j with row
# j + D/2 (it rotates halves); ggml's "llama" pairs row 2j with row 2j + 1. So the row that is
# (half, j) for the one is (j, half) for the other, within each head: a transpose. Keys have heads
# of their own, num_key_value_heads: with the wrong count only some shapes come out right. The order
# of values within a row, and so every block of a quantised row, stays as it is. The other
# architectures are computed with halves by ggml too, and stored as they are.
def to_hf_rows(rows: Tensor, heads: int) -> Tensor:
    """``[heads * D, ...]`` from the order of GGUF to that of Hugging Face, D even; copies."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_gguf_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``to_hf_rows``."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
