"""What makes a GGUF file a Llama: names and shapes of its tensors, its config, its order of rows.

Other models that llama.cpp stores as the architecture "llama" (Mistral, SmolLM, Yi, ...) are
covered where LlamaForCausalLM computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from effllm.formats.gguf.blocks import dequantize
from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.spec import GgufError, quote

ROPE_FREQS = "rope_freqs.weight"

# Of Llama 3.1, which all later ones share; GGUF has no keys for them.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192

# Keys with a meaning that LlamaForCausalLM does not have, and the value that means nothing.
_NEUTRAL: dict[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}


@dataclass(frozen=True)
class Slot:
    """One tensor of the architecture.

    Attributes:
        gguf: its name in the file.
        module, parameter: its name in the Hugging Face model.
        shape: in PyTorch's order.
        linear: the weight of an ``nn.Linear``, not of an embedding or a norm.
        heads: rows are in another order in the file, head by head; 0 if they are not.
    """

    gguf: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    linear: bool = False
    heads: int = 0


def slots(config: Mapping[str, Any]) -> Iterator[Slot]:
    """Every tensor that a Llama of this config has, in the order of its layers.

    ``config`` has the fields of LlamaConfig that ``read_config`` returns.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = heads * config["head_dim"], kv_heads * config["head_dim"]
    vocab = (config["vocab_size"], hidden)
    projections = (
        ("attn_q", "self_attn.q_proj", q, hidden, heads),
        ("attn_k", "self_attn.k_proj", kv, hidden, kv_heads),
        ("attn_v", "self_attn.v_proj", kv, hidden, 0),
        ("attn_output", "self_attn.o_proj", hidden, q, 0),
        ("ffn_gate", "mlp.gate_proj", inner, hidden, 0),
        ("ffn_up", "mlp.up_proj", inner, hidden, 0),
        ("ffn_down", "mlp.down_proj", hidden, inner, 0),
    )
    norms = (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
    yield Slot("token_embd.weight", "model.embed_tokens", "weight", vocab)
    for index in range(config["num_hidden_layers"]):
        block, layer = f"blk.{index}", f"model.layers.{index}"
        for name, module, n, k, permuted in projections:
            module = f"{layer}.{module}"
            yield Slot(f"{block}.{name}.weight", module, "weight", (n, k), True, permuted)
            if config["attention_bias" if name.startswith("attn") else "mlp_bias"]:
                yield Slot(f"{block}.{name}.bias", module, "bias", (n,), False, permuted)
        for name, module in norms:
            yield Slot(f"{block}.{name}.weight", f"{layer}.{module}", "weight", (hidden,))
    yield Slot("output_norm.weight", "model.norm", "weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield Slot("output.weight", "lm_head", "weight", vocab, True)


# A rotary embedding turns pairs of rows of a head, in D/2 planes. Hugging Face pairs row j with row
# j + D/2 (it rotates halves); ggml's "llama" pairs row 2j with row 2j + 1. So the row that is
# (half, j) for the one is (j, half) for the other, within each head: a transpose. Keys have heads
# of their own, num_key_value_heads: with the wrong count only some shapes come out right. The order
# of values within a row, and so every block of a quantised row, stays as it is.
def to_hf_rows(rows: Tensor, heads: int) -> Tensor:
    """``[heads * D, ...]`` from the order of GGUF to that of Hugging Face, D even; copies."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_gguf_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``to_hf_rows``."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def read_config(file: GgufFile) -> dict[str, Any]:
    """The arguments of ``transformers.LlamaConfig`` for the model in a file.

    All sizes are plain positive ints. ``rope_parameters`` is of type "default", "linear" or
    "llama3". Token ids that the file does not name are None.

    Raises:
        GgufError: the file is of another architecture, one part of several, lacks a key or has an
            impossible value, or has a feature that LlamaForCausalLM does not compute.
    """
    keys = _Keys(file)
    keys.refuse_others()
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", max(1, hidden // heads))
    value_dim = keys.integer("attention.value_length", head_dim)
    rotated = keys.integer("rope.dimension_count", head_dim)
    if not head_dim == value_dim == rotated or head_dim % 2:
        keys.fail(
            "heads must be equal in size, even and rotated as a whole, got "
            f"{head_dim} for keys, {value_dim} for values, {rotated} rotated"
        )
    if heads % kv_heads:
        keys.fail(f"{heads} heads cannot share {kv_heads} key-value heads")
    layers = keys.integer("block_count")
    if layers > len(file.tensors):
        keys.fail(f"{layers} layers, but only {len(file.tensors)} tensors")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        keys.fail("there is no matrix 'token_embd.weight'")
    vocab = embedding.shape[0]
    if keys.integer("vocab_size", vocab) != vocab:
        keys.fail(f"'llama.vocab_size' is not the {vocab} rows of 'token_embd.weight'")
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _read_rope(keys, file, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": keys.token("bos"),
        "eos_token_id": keys.token("eos"),
        "pad_token_id": keys.token("padding"),
    }


def config_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a file for a model of this config: the inverse of ``read_config``.

    ``config`` is ``LlamaConfig.to_dict()``, or has its fields. Of several end tokens the first is
    kept. Raises GgufError for what GGUF or llama.cpp cannot express.
    """
    rope = config["rope_parameters"]
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or config.get("hidden_act", "silu") != "silu":
        raise GgufError(
            "only SiLU and a rope_type of default, linear or llama3 can be stored, got "
            f"{config.get('hidden_act')!r} and {kind!r}"
        )
    prefixed: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind == "linear":
        prefixed["rope.scaling.type"] = "linear"
        prefixed["rope.scaling.factor"] = float(rope["factor"])
    if kind == "llama3":
        limits = (rope["low_freq_factor"], rope["high_freq_factor"])
        if limits != (_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR):
            raise GgufError(f"llama3 rope with frequency factors other than 1 and 4: {limits}")
        original = rope["original_max_position_embeddings"]
        prefixed["rope.scaling.original_context_length"] = original
    metadata: dict[str, Any] = {"general.architecture": "llama"}
    metadata |= {f"llama.{key}": value for key, value in prefixed.items()}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = config.get(f"{ours}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and token >= 0:
            metadata[f"tokenizer.ggml.{theirs}_token_id"] = token
    return metadata


def rope_freqs(rope: Mapping[str, Any], head_dim: int) -> Tensor | None:
    """What ggml divides the frequencies of llama3 scaling by, fp32 ``[head_dim / 2]``.

    None for other types of scaling. The formula is that of Llama 3.1: frequencies with wavelengths
    short against the original context stay, long ones are divided by ``factor``, those between are
    blended.
    """
    if rope.get("rope_type") != "llama3":
        return None
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    plane = torch.arange(0, head_dim, 2, dtype=torch.float64)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (plane / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _read_rope(keys: _Keys, file: GgufFile, head_dim: int) -> dict[str, Any]:
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        keys.fail(f"rope scaling {quote(kind)} is not supported, only linear and that of Llama 3")
    freqs = _read_freqs(keys, file, head_dim)
    if kind == "linear":
        if freqs is not None:
            keys.fail(f"both linear rope scaling and '{ROPE_FREQS}'")
        factor = keys.number("rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if freqs is None:
        return {"rope_type": "default", "rope_theta": theta}
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": _shortest(float(freqs.max())),
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", _ORIGINAL_CONTEXT
        ),
    }
    # The parameters are not in the file, only what follows from them: accepted if it does.
    expected = rope_freqs(rope, head_dim)
    assert expected is not None
    if not torch.allclose(freqs, expected, rtol=1e-4, atol=0):
        keys.fail(f"'{ROPE_FREQS}' is not the rope scaling of Llama 3")
    return rope


def _read_freqs(keys: _Keys, file: GgufFile, head_dim: int) -> Tensor | None:
    info = file.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    if info.shape != (head_dim // 2,):
        keys.fail(f"'{ROPE_FREQS}' must be [{head_dim // 2}], got {list(info.shape)}")
    freqs = dequantize(file.raw(ROPE_FREQS), info.type, info.shape)
    if not (torch.isfinite(freqs) & (freqs >= 1)).all():
        keys.fail(f"'{ROPE_FREQS}' must be finite and at least 1")
    return freqs


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Keys:
    """Metadata of the architecture, by type; what is wrong names file and key."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def refuse_others(self) -> None:
        """Everything that would be a model with other results, if it were loaded as a Llama."""
        architecture = self._file.metadata.get("general.architecture")
        if architecture != "llama":
            self.fail(f"'general.architecture' must be 'llama', got {quote(str(architecture))}")
        parts = self._file.metadata.get("split.count", 0)
        if not isinstance(parts, int) or parts > 1:
            self.fail(f"one of {parts} parts of a model; merge them (gguf-split --merge)")
        for key, neutral in _NEUTRAL.items():
            value = self._file.metadata.get(f"llama.{key}", neutral)
            if isinstance(value, np.ndarray | list) or value != neutral:
                self.fail(f"'llama.{key}' is {quote(str(value))}, which a Llama does not have")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(f"llama.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            self.fail(f"'llama.{key}' must be a positive integer, got {quote(str(value))}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(f"llama.{key}", default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            self.fail(f"'llama.{key}' must be a positive float, got {quote(str(value))}")
        return _shortest(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(f"llama.{key}", default)
        if not isinstance(value, str):
            self.fail(f"'llama.{key}' must be a string, got {quote(str(value))}")
        return value

    def token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._file.metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            self.fail(f"'{key}' must be an integer, got {quote(str(value))}")
        return value

    def fail(self, problem: str) -> NoReturn:
        raise GgufError(f"{self._file.path}: {problem}")

    def _get(self, key: str, default: object) -> object:
        value: object = self._file.metadata.get(key, default)
        if value is None:
            self.fail(f"metadata key '{key}' is missing")
        return value
