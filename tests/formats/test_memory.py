"""Peak memory of load and convert: the quantised model and one layer, measured in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formats_zoo import Zoo, write_checkpoint, write_config, write_tensors
from tiny_models import llama_config

MIB = 1 << 20
HIDDEN, INNER, LAYERS, VOCAB = 512, 2048, 24, 512
LARGEST = HIDDEN * INNER * 4  # in fp32
# Code that is run for the first time, and the like: 25 MiB were seen. Well below the size of the
# file, so that a second copy of it, be it mapped, is too much.
FIXED = 52 * MIB


def write_large_checkpoint(folder: Path) -> int:
    """49 MiB of pack-quantized layers with random codes; returns the size of the weights."""
    kind = Zoo("pack-quantized", symmetric=True, group_size=64)
    config = llama_config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (128, HIDDEN))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN))
    shapes["mlp.down_proj"] = (HIDDEN, INNER)
    tensors = {name: torch.rand(VOCAB, HIDDEN) for name in ("embed_tokens", "lm_head")}
    tensors["norm"] = torch.ones(HIDDEN)
    tensors = {f"{'' if n == 'lm_head' else 'model.'}{n}.weight": t for n, t in tensors.items()}
    for i in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(HIDDEN)
        for part, (n, k) in shapes.items():
            name = f"model.layers.{i}.{part}"
            words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32)
            tensors[f"{name}.weight_packed"] = words
            tensors[f"{name}.weight_scale"] = torch.rand(n, k // 64)
            tensors[f"{name}.weight_shape"] = torch.tensor([n, k])
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    write_config(folder, config, kind.quantization_config(), torch.float16)
    write_tensors(folder, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_one_layer_beside_the_quantised_model(tmp_path: Path) -> None:
    size = write_large_checkpoint(tmp_path / "source")
    write_checkpoint(tmp_path / "tiny", Zoo("pack-quantized", symmetric=True))
    # Blocks of memory that are freed go back to the system, and so are not counted twice.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("peak_memory.py")
    run = subprocess.run(
        [sys.executable, script, tmp_path], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == {"load", "convert", "convert to GGUF", "load GGUF"}
    for step, (grown, model) in found.items():
        assert model == pytest.approx(size, rel=0.1), step
        assert grown < model + LARGEST + FIXED, f"{step}: {grown / MIB:.0f} MiB"
