"""Attention sinks in the layer, and gpt-oss through every way into the attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY, using
from torch import Tensor

from effllm.cache import PagedContext, PagedKVCache
from effllm.nn import PagedAttention
from effllm.testing import hostile

transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

import effllm.integrations.transformers  # noqa: E402  (imports transformers)


def test_in_the_layer(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cache = PagedKVCache(
        1, 2, 32, max_batch=1, max_seq_len=8, page_size=4, dtype=dtype, device=device
    )
    context = PagedContext(cache, cache.step([(cache.add(), 6)]))
    q, k, v = (
        hostile.normal(6, heads, 32, dtype=dtype, device=device, seed=heads + s, outliers=0)
        for heads, s in ((4, 0), (2, 0), (2, 1))
    )
    sinks = torch.tensor([3.0, -1.0, 10.0, 0.0], device=device)
    out = PagedAttention(4, 2, 32)(q, k, v, context, 0, sinks=sinks)
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * 32**-0.5
    scores = scores.masked_fill(~torch.ones(6, 6, device=device).tril().bool(), -torch.inf)
    column = sinks.double()[:, None, None].expand(4, 6, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("hqk,khd->qhd", weights, values)
    tolerance = 1e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def gpt_oss() -> Any:
    """Sliding and full layers by turns, sinks that take a large part of the softmax."""
    config = transformers.GptOssConfig(
        **(TINY | {"intermediate_size": 48}),
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(mean=1.0, std=2.0)
    return model


IDS = torch.tensor([[0, 0, 5, 17, 42, 8, 3, 77], [90, 33, 21, 54, 7, 7, 19, 4]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def logits(model: Any, implementation: str, ids: Tensor) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_gpt_oss_forward(gpt_oss: Any) -> None:
    expected = logits(gpt_oss, "eager", IDS[1:])
    ours = logits(gpt_oss, "effllm", IDS[1:])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for layer in gpt_oss.model.layers:
        layer.self_attn.sinks.data.fill_(-100.0)
    assert (logits(gpt_oss, "eager", IDS[1:]) - expected).abs().max() > 0.1  # sinks matter


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("paged", [True, False])
def test_gpt_oss_generate(gpt_oss: Any, paged: bool, num_beams: int) -> None:
    options = {**INPUTS, "max_new_tokens": 10, "do_sample": False, "num_beams": num_beams}
    gpt_oss.set_attn_implementation("eager")
    expected = gpt_oss.generate(**options)
    gpt_oss.set_attn_implementation("effllm")
    if paged:
        cache = effllm.integrations.transformers.PagedCache(gpt_oss.config, max_seq_len=32)
        options |= using(gpt_oss, cache)
    assert torch.equal(gpt_oss.generate(**options), expected)


def test_gpt_oss_in_our_generate(gpt_oss: Any) -> None:
    prompts = [[5, 17, 42, 8, 3, 77], IDS[1].tolist()]
    ours = effllm.generate(gpt_oss, prompts, max_new_tokens=8)
    gpt_oss.set_attn_implementation("eager")
    for prompt, generation in zip(prompts, ours, strict=True):
        alone = gpt_oss.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert generation.tokens == alone[0, len(prompt) :].tolist()
