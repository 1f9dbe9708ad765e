"""Checkpoints whose codes are bytes, and bitsandbytes': kinds for ``formats_zoo``.

Decoded here in numpy, with nothing of the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

PLAIN = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass
class Dense:
    """A decoded weight, fp32 [N, K]."""

    dense: Tensor


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity."""
    exponent, fraction = int(byte) >> 3 & 15, int(byte) & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 128 else size


E4M3 = np.array([e4m3(byte) for byte in range(256)])


@dataclass(frozen=True)
class Kind:
    """What ``formats_zoo`` needs to know of every kind."""

    format: str = ""
    dtype: torch.dtype = torch.float16  # of scales and unquantised tensors
    bias: bool = False
    tied: bool = False
    head: bool = False
    intermediate: int = 96
    shards: int = 1

    @property
    def id(self) -> str:
        changed = [f for f in fields(self) if f.name != "format"]
        changed = [f for f in changed if getattr(self, f.name) != f.default]
        return "-".join([self.format, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])


def kept(weight: Tensor, mask: np.ndarray, sparsity: str) -> dict[str, Tensor]:
    """The tensors of a sparse weight [N, K] of any dtype."""
    n, k = mask.shape
    bitmask = np.packbits(mask, 1, "little")
    stored = weight.view(torch.int8) if weight.element_size() == 1 else weight
    values = stored[torch.from_numpy(mask)].view(weight.dtype)
    tensors = {"compressed": values, "bitmask": torch.from_numpy(bitmask)}
    if sparsity == "sparse-24-bitmask":
        shape = {"compressed": values.view(n, k // 2), "shape": torch.tensor([[n], [k]])}
        return tensors | shape
    offsets = torch.from_numpy(mask.sum(1).cumsum() - mask.sum(1))
    return tensors | {"shape": torch.tensor([n, k]), "row_offsets": offsets}


def random_mask(n: int, k: int, sparsity: str, rng: np.random.Generator) -> np.ndarray:
    """Two of each four, or about a third of all."""
    if sparsity == "sparse-bitmask":
        return rng.uniform(size=(n, k)) < 0.3
    order = rng.permuted(np.tile([True, True, False, False], (n * k // 4, 1)), axis=1)
    return order.reshape(n, k)


@dataclass(frozen=True)
class Sparse(Kind):
    """compressed-tensors, sparse and not quantised."""

    bits: ClassVar[int] = 16
    format: str = "sparse-24-bitmask"

    def layer(self, n: int, k: int, seed: int) -> tuple[Dense, dict[str, Tensor]]:
        rng = np.random.default_rng(seed)
        mask = random_mask(n, k, self.format, rng)
        weight = torch.from_numpy(rng.normal(size=(n, k)) * 0.2).to(self.dtype)
        dense = weight.float() * torch.from_numpy(mask)
        return Dense(dense), kept(weight, mask, self.format)

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "compressed-tensors",
            "sparsity_config": sparsity_config(self.format),
        }


def sparsity_config(sparsity: str) -> dict[str, Any]:
    structure = "2:4" if sparsity == "sparse-24-bitmask" else "unstructured"
    return {
        "format": sparsity,
        "global_sparsity": 0.5,
        "sparsity_structure": structure,
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Bytes(Kind):
    """compressed-tensors' plain formats, and FP8 as Hugging Face has it.

    Attributes:
        strategy: "tensor", "channel", "group" or "block".
        floats: e4m3 codes.
        exponents: of FP8: scales as this dtype of ue8m0.
        static: with scales of activations, which nobody needs.
        name: of FP8: what the scale is called.
        sparsity: of compressed-tensors: how zeros are left out.
    """

    format: str = "float-quantized"
    strategy: str = "channel"
    floats: bool = True
    symmetric: bool = True
    bits: int = 8
    block: tuple[int, int] = (32, 48)
    exponents: torch.dtype | None = None
    static: bool = False
    name: str = "weight_scale_inv"
    sparsity: str | None = None

    def rows_and_columns(self, n: int, k: int) -> tuple[int, int]:
        return {"tensor": (n, k), "channel": (1, k), "group": (1, 32), "block": self.block}[
            self.strategy
        ]

    def layer(self, n: int, k: int, seed: int) -> tuple[Dense, dict[str, Tensor]]:
        rng = np.random.default_rng(seed)
        rows, columns = self.rows_and_columns(n, k)
        shape = (-(-n // rows), -(-k // columns))
        codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
        if self.floats:
            codes[codes & 127 == 127] = 0  # NaN
            values = E4M3[codes]
        else:
            low = -(1 << self.bits - 1)
            values = rng.integers(low, -low, (n, k))
            codes = values.astype(np.int8).view(np.uint8)
        if self.sparsity is not None:
            mask = random_mask(n, k, self.sparsity, rng)
            values, codes = values * mask, codes * mask
        zeros = np.zeros(shape, np.int64)
        if not self.symmetric:
            zeros = rng.integers(-(1 << self.bits - 1), 1 << self.bits - 1, shape)
        scale = torch.from_numpy(rng.uniform(1e-4, 3e-4, shape)).to(self.dtype)
        if self.exponents is not None:
            stored = torch.from_numpy(rng.integers(110, 118, shape).astype(np.uint8))
            scale = torch.from_numpy(2.0 ** (stored.numpy().astype(int) - 127))
        factor = scale.float().numpy()
        at = np.ix_(np.arange(n) // rows, np.arange(k) // columns)
        dense = (values - zeros[at]).astype(np.float32) * factor[at].astype(np.float32)
        weight = torch.from_numpy(codes)
        weight = weight.view(torch.float8_e4m3fn if self.floats else torch.int8)
        tensors = {"weight": weight}
        if self.sparsity is not None:
            tensors = kept(weight, mask, self.sparsity)
        scale = scale if self.exponents is None else stored.view(self.exponents)
        if self.strategy == "tensor":
            scale = scale.view(1) if self.format in PLAIN else scale.view(())
        tensors["weight_scale" if self.format in PLAIN else self.name] = scale
        if not self.symmetric:
            zero_point = torch.from_numpy(zeros.astype(np.int8))
            tensors["weight_zero_point"] = zero_point.view(scale.shape)
        if self.static:
            tensors["input_scale" if self.format in PLAIN else "activation_scale"] = torch.ones(1)
        return Dense(torch.from_numpy(dense)), tensors

    def quantization_config(self) -> dict[str, Any]:
        if self.format == "fp8":
            return {
                "quant_method": "fp8",
                "activation_scheme": "static" if self.static else "dynamic",
                "weight_block_size": list(self.block) if self.strategy == "block" else None,
                "fmt": "e4m3",
                "scale_fmt": "float" if self.exponents is None else "ue8m0",
                "modules_to_not_convert": ["lm_head"],
            }
        weights = {
            "num_bits": self.bits,
            "type": "float" if self.floats else "int",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": 32 if self.strategy == "group" else None,
            "block_structure": list(self.block) if self.strategy == "block" else None,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {"num_bits": 8, "dynamic": not self.static},
        }
        sparse = (
            {} if self.sparsity is None else {"sparsity_config": sparsity_config(self.sparsity)}
        )
        return sparse | {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [] if self.head else ["lm_head"],
        }


@dataclass(frozen=True)
class Blockwise(Kind):
    """bitsandbytes NF4 and FP4."""

    bits: ClassVar[int] = 4
    format: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    storage: torch.dtype = torch.uint8

    def layer(self, n: int, k: int, seed: int) -> tuple[Dense, dict[str, Tensor]]:
        rng = np.random.default_rng(seed)
        count = n * k
        blocks = -(-count // self.blocksize)
        codes = rng.integers(0, 16, count + count % 2)
        quant_map = rng.uniform(-1, 1, 16).astype(np.float32)
        absmax = rng.uniform(0.01, 0.03, blocks).astype(np.float32)
        state: dict[str, Any] = {"quant_type": self.format, "blocksize": self.blocksize}
        state |= {"dtype": "float16", "shape": [n, k]}
        nested: dict[str, Tensor] = {}
        stored = torch.from_numpy(absmax)
        if self.nested:
            stored = torch.from_numpy(rng.integers(0, 256, blocks).astype(np.uint8))
            nested_map = rng.uniform(-1, 1, 256).astype(np.float32)
            nested_absmax = rng.uniform(0.001, 0.003, -(-blocks // 256)).astype(np.float32)
            offset = np.float32(0.0213)
            absmax = nested_map[stored.numpy()] * nested_absmax[np.arange(blocks) // 256] + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
            state["nested_offset"] = float(offset)
            nested = {
                "weight.nested_absmax": torch.from_numpy(nested_absmax),
                "weight.nested_quant_map": torch.from_numpy(nested_map),
            }
        dense = quant_map[codes[:count]] * absmax[np.arange(count) // self.blocksize]
        packed = torch.from_numpy((codes[::2] * 16 + codes[1::2]).astype(np.uint8))
        text = list(json.dumps(state).encode())
        tensors = {
            "weight": packed.view(self.storage)[:, None],
            "weight.absmax": stored,
            "weight.quant_map": torch.from_numpy(quant_map),
            f"weight.quant_state.bitsandbytes__{self.format}": torch.tensor(text).byte(),
        }
        return Dense(torch.from_numpy(dense).view(n, k)), tensors | nested

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.format,
            "bnb_4bit_use_double_quant": self.nested,
            "llm_int8_skip_modules": None,
        }


@dataclass(frozen=True)
class Int8(Kind):
    """bitsandbytes LLM.int8()."""

    bits: ClassVar[int] = 8
    format: str = "llm_int8"

    def layer(self, n: int, k: int, seed: int) -> tuple[Dense, dict[str, Tensor]]:
        rng = np.random.default_rng(seed)
        codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
        scb = rng.uniform(1, 3, n).astype(np.float32)
        step = np.float32(1 / 127)
        dense = codes.astype(np.float32) * scb[:, None] * step
        tensors = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(scb)}
        tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return Dense(torch.from_numpy(dense)), tensors

    def quantization_config(self) -> dict[str, Any]:
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_8bit": True}
