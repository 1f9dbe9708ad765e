"""Rotary embeddings that are scaled to longer contexts: read from a GGUF file, and written to one.

Types are those of transformers: "default", "linear", "yarn" and "llama3". The last has no keys in
GGUF: a tensor holds the factors that follow from its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effllm.formats.gguf.blocks import DECODED, dequantize
from effllm.formats.gguf.keys import Keys, shortest
from effllm.formats.gguf.reader import GgufFile
from effllm.formats.gguf.spec import GgufError, quote

ROPE_FREQS = "rope_freqs.weight"

# Of Llama 3.1, which all later ones share; GGUF has no keys for them.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192

# What llama.cpp computes yarn with, and what transformers does where nothing else is said.
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
_STORED = ("default", "linear", "llama3", "yarn")


def read_rope(keys: Keys, file: GgufFile, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of the config. Raises GgufError for all that is not listed above."""
    rope: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    # Files with a factor and no type are of the time when linear scaling was all there was.
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scaling.factor") else "none")
    if kind not in ("none", "linear", "yarn"):
        keys.fail(
            f"rope scaling {quote(kind)} is not supported, only linear, yarn and that of Llama 3"
        )
    freqs = _read_freqs(keys, file, head_dim)
    if freqs is not None:
        if kind != "none":
            keys.fail(f"both {kind} rope scaling and '{ROPE_FREQS}'")
        return _llama3(keys, rope, freqs, head_dim)
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        return rope | _read_yarn(keys)
    return rope | {"rope_type": "default"}


def rope_metadata(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``rope_parameters``, without their prefix: the inverse of ``read_rope``, but for
    the tensor of ``rope_freqs``. Raises GgufError for what has no keys."""
    kind = rope.get("rope_type", "default")
    if kind not in _STORED:
        raise GgufError(f"only a rope_type of {', '.join(_STORED)} can be stored, got {kind!r}")
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = kind
        keys["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        for name, value in _YARN.items():
            if rope.get(name, value) not in (value, None):
                raise GgufError(f"yarn rope scaling with '{name}' {rope[name]} cannot be stored")
    if kind == "llama3":
        limits = (rope["low_freq_factor"], rope["high_freq_factor"])
        if limits != (_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR):
            raise GgufError(f"llama3 rope with frequency factors other than 1 and 4: {limits}")
    if kind in ("llama3", "yarn"):
        original = rope["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
    return keys


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


def _read_yarn(keys: Keys) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
    }


def _llama3(keys: Keys, rope: dict[str, Any], freqs: Tensor, head_dim: int) -> dict[str, Any]:
    found = rope | {
        "rope_type": "llama3",
        "factor": shortest(float(freqs.max())),
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", _ORIGINAL_CONTEXT
        ),
    }
    # The parameters are not in the file, only what follows from them: accepted if it does.
    expected = rope_freqs(found, head_dim)
    assert expected is not None
    if not torch.allclose(freqs, expected, rtol=1e-4, atol=0):
        keys.fail(f"'{ROPE_FREQS}' is not the rope scaling of Llama 3")
    return found


def _read_freqs(keys: Keys, file: GgufFile, head_dim: int) -> Tensor | None:
    info = file.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    if info.shape != (head_dim // 2,):
        keys.fail(f"'{ROPE_FREQS}' must be [{head_dim // 2}], got {list(info.shape)}")
    if info.type not in DECODED:
        keys.fail(f"'{ROPE_FREQS}' is {info.type.name}, which cannot be decoded")
    freqs = dequantize(file.raw(ROPE_FREQS), info.type, info.shape)
    if not (torch.isfinite(freqs) & (freqs >= 1)).all():
        keys.fail(f"'{ROPE_FREQS}' must be finite and at least 1")
    return freqs
