"""Models quantised, compressed and saved by the package compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effllm


def load_what_it_writes(
    model: Any, folder: Path, format: str, scales: tuple[float, float], **weights: Any
) -> Any:
    """Our model of the package's files; its dense weights are those that the package decodes.

    ``weights`` are of QuantizationArgs, symmetric among them; scales are random in their range.
    """
    package = pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=format,
        quantization_status=QuantizationStatus.FROZEN,
    )
    model = model.to(torch.bfloat16)
    apply_quantization_config(model, config, show_progress=False)
    low, high = scales
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            shape = module.weight_scale.shape
            module.weight_scale.data.copy_(torch.rand(shape) * (high - low) + low)
            if not args.symmetric:
                half = 1 << args.num_bits - 1
                zeros = torch.randint(-half, half, module.weight_zero_point.shape)
                module.weight_zero_point.data.copy_(zeros)
    compressor = package.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    ours = effllm.load(folder, progress=False)
    compressor.decompress_model(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # FP8 layers of ours have fp32 scales, and so weights.
            weight = ours.get_submodule(name).weight.to(module.weight.dtype)
            assert torch.equal(weight, module.weight), name
    return ours
