"""What quantisation costs the demo's draft model, in perplexity over held-out text."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import effllm
from effllm import demo
from effllm.demo.corpus import stdlib_directory
from effllm.quantization import Method, dequantize_

pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

# Modules of the standard library that the models were trained on.
CALIBRATION = ("argparse.py", "configparser.py", "typing.py")


@functools.cache
def draft() -> tuple[Any, Tensor, Tensor]:
    """The demo's draft model in bf16, calibration tokens, and held-out tokens."""
    model, tokenizer = demo.load(demo.draft_path())
    rows = []
    for name in CALIBRATION:
        ids = tokenizer((stdlib_directory() / name).read_text("utf-8"), verbose=False).input_ids
        rows += [ids[:512], ids[1024:1536]]
    return model, torch.tensor(rows), demo.held_out_tokens(tokenizer, context=512, limit=4096)


def perplexity(config: Method) -> float:
    return measure(config)[0]


def output_error(config: Method) -> float:
    return measure(config)[1]


@functools.cache
def measure(config: Method) -> tuple[float, float]:
    """Perplexity, and the mean error of a layer's output over the calibration data."""
    return measure_any(config, config.needs_calibration)


def measure_any(config: Any, calibrated: bool) -> tuple[float, float]:
    model, calibration, held_out = draft()
    model = copy.deepcopy(model)
    report = effllm.quantize_(
        model,
        config,
        lambda module, name: name != "lm_head",
        calibration=calibration if calibrated else None,
        progress=False,
    )
    dequantize_(model, torch.bfloat16)
    errors = [layer.output_error or 0 for layer in report.layers]
    return demo.perplexity(model, held_out), sum(errors) / len(errors)
