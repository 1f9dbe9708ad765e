"""A file that llama.cpp's own tools have made; see data/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import effllm
from effllm.formats.gguf import GgufFile, read_tokenizer

FILE = Path(__file__).parent / "data" / "llama_cpp_q4_k_m.gguf"


def test_gives_the_tokens_and_logits_of_llama_cpp() -> None:
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    with safe_open(FILE.with_suffix(".safetensors"), "pt") as expected:
        text = expected.metadata()["text"]
        ids, logits = expected.get_tensor("ids"), expected.get_tensor("logits")
    tokenizer = read_tokenizer(GgufFile(FILE))
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    model = effllm.load(FILE, dtype=torch.float32, progress=False)
    assert {row.format for row in model.effllm_report.layers} == {"q4_k", "q5_0", "q6_k"}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0, -4:], logits, rtol=1e-5, atol=1e-5)
