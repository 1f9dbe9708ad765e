"""Tiny random Llama checkpoints in every format, with the dense model that they stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import formats_reference as reference
import torch
from safetensors.torch import save_file
from tiny_models import llama_config
from torch import Tensor, nn


@dataclass(frozen=True)
class Zoo:
    """One kind of checkpoint."""

    format: str  # as effllm.formats.config spells it
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    shuffled: bool = False
    dtype: torch.dtype = torch.float16  # of scales and unquantised tensors
    bias: bool = False
    tied: bool = False
    intermediate: int = 96
    shards: int = 1
    head: bool = False  # quantise lm_head too

    @property
    def id(self) -> str:
        parts = [self.format, f"{self.bits}bit", f"g{self.group_size}"]
        parts += ["sym" if self.symmetric else "asym", str(self.dtype).removeprefix("torch.")]
        flags = ("shuffled", "bias", "tied", "head")
        parts += [name for name in flags if getattr(self, name)]
        return "-".join([*parts, f"i{self.intermediate}", f"s{self.shards}"])

    def quantization_config(self) -> dict[str, Any]:
        if self.format == "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group_size,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": None,
            }
        if self.format == "pack-quantized":
            weights = {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.symmetric,
                "strategy": "channel" if self.group_size == -1 else "group",
                "group_size": None if self.group_size == -1 else self.group_size,
            }
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": [] if self.head else ["lm_head"],
            }
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.shuffled,
            "checkpoint_format": self.format,
        }

    def layer(self, n: int, k: int, seed: int) -> tuple[reference.Weight, dict[str, Tensor]]:
        """A random weight, and its tensors on disk."""
        weight = reference.random_weight(
            n,
            k,
            self.bits,
            k if self.group_size == -1 else self.group_size,
            symmetric=self.symmetric,
            shuffled=self.shuffled,
            dtype=self.dtype,
            seed=seed,
        )
        if self.format == "awq":
            return weight, reference.awq_tensors(weight)
        if self.format == "pack-quantized":
            return weight, reference.packed_tensors(weight, self.symmetric)
        return weight, reference.gptq_tensors(weight, 2 if self.format == "gptq_v2" else 1)


@dataclass
class Written:
    """A checkpoint on disk."""

    folder: Path
    dense: Any  # LlamaForCausalLM in fp32 with the decoded weights
    weights: dict[str, Any]  # of the quantised layers, with an attribute `dense`
    tensors: dict[str, Tensor]  # all that is on disk


def tiny_config(zoo: Any) -> Any:
    return llama_config(
        vocab_size=72,
        intermediate_size=zoo.intermediate,
        num_hidden_layers=2,
        attention_bias=zoo.bias,
        mlp_bias=zoo.bias,
        tie_word_embeddings=zoo.tied,
    )


def write_checkpoint(folder: Path, zoo: Any) -> Written:
    """Makes the dense model, quantises nothing (codes are random), writes all files.

    ``zoo`` is a ``Zoo`` or another kind with the attributes used here and ``layer``.
    """
    import transformers

    config = tiny_config(zoo)
    dense = transformers.LlamaForCausalLM(config).eval()
    if zoo.bias:
        for name, parameter in dense.named_parameters():
            if name.endswith(".bias"):
                nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.to(zoo.dtype))
    weights: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for index, (name, module) in enumerate(dense.named_modules()):
        if type(module) is not nn.Linear or (name == "lm_head" and not zoo.head):
            continue
        n, k = module.weight.shape
        weight, layer = zoo.layer(n, k, index)
        weights[name] = weight
        if zoo.head and zoo.tied and name == "lm_head":
            module.weight = nn.Parameter(torch.empty(n, k))  # no longer the embedding's
        module.weight.data.copy_(weight.dense)
        tensors.update({f"{name}.{part}": tensor for part, tensor in layer.items()})
    for name, parameter in dense.named_parameters():
        if name.removesuffix(".weight") not in weights:
            tensors[name] = parameter.detach().to(zoo.dtype)
    write_config(folder, config, zoo.quantization_config(), zoo.dtype)
    write_tensors(folder, tensors, zoo.shards)
    return Written(folder, dense, weights, tensors)


def write_config(folder: Path, config: Any, quantization: Any, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    if quantization is not None:
        values["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(values))


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of ``quantization_config``."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
