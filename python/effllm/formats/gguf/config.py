"""The config of the model in a GGUF file, and the metadata of a file for a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from effllm.formats.gguf.architecture import (
    ARCHITECTURES,
    Architecture,
    Field,
    architecture_of,
)
from effllm.formats.gguf.keys import Keys
from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.rope import read_rope, rope_metadata
from effllm.formats.gguf.spec import GgufError, quote

TOKENS = "tokenizer.ggml.tokens"

# Keys with a meaning that the models do not have, and the value that means nothing.
_NEUTRAL: dict[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}

# -1, as converters spell a token that there is none of.
_NO_TOKEN = (-1, (1 << 32) - 1)

# Of a turn (instruction models end it with another token than a text), and of a message.
_MORE_ENDS = ("eot", "eom")

# Gemma 2 divides scores by the root of its head dim, but in the size of this many layers by that of
# its hidden size per head. llama.cpp tells them apart just so.
_GEMMA2_27B_LAYERS = 46


def read_config(file: GgufFile) -> dict[str, Any]:
    """The arguments of ``transformers.AutoConfig.for_model`` for the model in a file.

    ``model_type`` is "llama", "qwen2", "qwen3", "gemma" or "gemma2"; all sizes are plain positive
    ints. ``rope_parameters`` is of type "default", "linear", "yarn" or "llama3". Token ids that the
    file does not name are None.

    Raises:
        GgufError: the file is of another architecture, one part of several, lacks a key or has an
            impossible value, or has a feature that the model does not compute.
    """
    row = _architecture(file)
    keys = Keys(file, row.name)
    _refuse_others(file, keys, row)
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        keys.fail(f"{heads} heads cannot share {kv_heads} key-value heads")
    head_dim = _head_dim(keys, max(1, hidden // heads))
    layers = keys.integer("block_count")
    if layers > len(file.tensors):
        keys.fail(f"{layers} layers, but only {len(file.tensors)} tensors")
    vocab = _vocab_size(file, keys)
    activation, value = row.activation
    config = {
        "model_type": row.model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        activation: value,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": read_rope(keys, file, head_dim),
        **row.read_bias_fields(file.tensors),
        **{field.config: _read_field(keys, field) for field in row.fields},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token_id(file, "bos", vocab),
        "eos_token_id": token_id(file, "eos", vocab),
        "pad_token_id": token_id(file, "padding", vocab),
    }
    if row.name == "gemma2":
        config["query_pre_attn_scalar"] = _gemma2_scalar(config)
    return config


def config_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a file for a model of this config: the inverse of ``read_config``.

    ``config`` is ``model.config.to_dict()``, or has its fields. Of several end tokens the first is
    kept. Raises GgufError for what GGUF or llama.cpp cannot express.
    """
    row = architecture_of(config.get("model_type"))
    if row is None:
        known = ", ".join(sorted({row.model_type for row in ARCHITECTURES.values()} | {"mistral"}))
        raise GgufError(f"only {known} can be stored, got {config.get('model_type')!r}")
    _refuse_config(row, config)
    head_dim = head_dim_of(config)
    prefixed: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        **rope_metadata(config["rope_parameters"]),
        **{field.key: type(field.default)(config[field.config]) for field in row.fields},
    }
    metadata: dict[str, Any] = {"general.architecture": row.name}
    metadata |= {f"{row.name}.{key}": value for key, value in prefixed.items()}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = config.get(f"{ours}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and token >= 0:
            metadata[f"tokenizer.ggml.{theirs}_token_id"] = token
    return metadata


def end_tokens(file: GgufFile, vocab: int) -> list[int]:
    """All tokens that end a text: beside that of the config those that end a turn or a message."""
    found = (token_id(file, name, vocab) for name in ("eos", *_MORE_ENDS))
    return list(dict.fromkeys(token for token in found if token is not None))


def more_ends(eos: object, ends: object) -> dict[str, int]:
    """The keys of up to two of the ``ends``, an id or several, that are not the ``eos`` itself."""
    others = [token for token in (ends if isinstance(ends, list) else [ends]) if token != eos]
    keys = (f"tokenizer.ggml.{name}_token_id" for name in _MORE_ENDS)
    return {key: token for key, token in zip(keys, others, strict=False) if isinstance(token, int)}


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Configs of some models have no ``head_dim``."""
    found = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(found)


def _architecture(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    row = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise GgufError(
            f"{file.path}: 'general.architecture' must be one of {known}, got {quote(str(name))}"
        )
    return row


def _refuse_others(file: GgufFile, keys: Keys, row: Architecture) -> None:
    """Everything that would be a model with other results."""
    parts = file.metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        keys.fail(f"one of {parts} parts of a model; merge them (gguf-split --merge)")
    known = {field.key for field in row.fields}
    for key, neutral in _NEUTRAL.items():
        value = file.metadata.get(keys.name(key), neutral)
        if key not in known and (isinstance(value, np.ndarray | list) or value != neutral):
            keys.fail(
                f"'{keys.name(key)}' is {quote(str(value))}, which a model of {row.name} "
                "does not have"
            )


def _head_dim(keys: Keys, default: int) -> int:
    head_dim = keys.integer("attention.key_length", default)
    value_dim = keys.integer("attention.value_length", head_dim)
    rotated = keys.integer("rope.dimension_count", head_dim)
    if not head_dim == value_dim == rotated or head_dim % 2:
        keys.fail(
            "heads must be equal in size, even and rotated as a whole, got "
            f"{head_dim} for keys, {value_dim} for values, {rotated} rotated"
        )
    return head_dim


def _vocab_size(file: GgufFile, keys: Keys) -> int:
    """The rows of the embedding, on which all that the file says of it must agree."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        keys.fail("there is no matrix 'token_embd.weight'")
    vocab = embedding.shape[0]
    if keys.integer("vocab_size", vocab) != vocab:
        keys.fail(f"'{keys.name('vocab_size')}' is not the {vocab} rows of 'token_embd.weight'")
    tokens = file.metadata.get(TOKENS)
    if isinstance(tokens, list) and len(tokens) != vocab:
        keys.fail(f"'{TOKENS}' has {len(tokens)} tokens, 'token_embd.weight' {vocab} rows")
    return vocab


def _read_field(keys: Keys, field: Field) -> int | float:
    if isinstance(field.default, int):
        return keys.integer(field.key, field.default)
    return keys.number(field.key, field.default)


def token_id(file: GgufFile, name: str, vocab: int) -> int | None:
    """The id of a role ("bos", "eos", ...), None if there is none. Raises GgufError."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key)
    if value is None or (isinstance(value, int) and value in _NO_TOKEN):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
        raise GgufError(
            f"{file.path}: '{key}' must be an integer below {vocab}, got {quote(str(value))}"
        )
    return value


def _gemma2_scalar(config: Mapping[str, Any]) -> int:
    if config["num_hidden_layers"] == _GEMMA2_27B_LAYERS:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return head_dim_of(config)


def _refuse_config(row: Architecture, config: Mapping[str, Any]) -> None:
    """What a config can say and llama.cpp would not do."""
    activation, value = row.activation
    if config.get(activation, value) != value:
        raise GgufError(
            f"'{activation}' must be {value!r} for {row.name} to be stored, "
            f"got {config[activation]!r}"
        )
    for field in row.fields:
        if config[field.config] is None:
            raise GgufError(f"'{field.config}' must be a number for {row.name} to be stored")
    if row.name == "gemma2" and config["query_pre_attn_scalar"] != _gemma2_scalar(config):
        raise GgufError(
            f"'query_pre_attn_scalar' must be {_gemma2_scalar(config)} for this size to be stored, "
            f"got {config['query_pre_attn_scalar']}"
        )
    windows = {field.config for field in row.fields} & {"sliding_window"}
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    uses = config.get("use_sliding_window", True) and config.get("sliding_window") is not None
    if not windows and (sliding or uses):
        raise GgufError(f"sliding windows cannot be stored for {row.name}")
