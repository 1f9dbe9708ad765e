"""attn_implementation="effllm" against transformers' own eager and sdpa attention."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import TINY, using
from torch import Tensor

from effllm.cache import PagedKVCache

transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

from effllm.integrations.transformers import (  # noqa: E402  (imports transformers)
    PagedCache,
    PagedContext,
    effllm_attention,
    effllm_mask,
)

PROMPTS = [[5, 17, 42, 8, 3, 77, 61], [11, 2], [90, 33, 21, 54]]


def padded(prompts: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width)
    for row, prompt in enumerate(prompts):
        columns = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def logits(model: Any, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forward_with_padding(llama: Any, side: str) -> None:
    inputs = padded(PROMPTS, side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = inputs["attention_mask"].bool()
    ours, theirs = logits(llama, "effllm", **inputs), logits(llama, "sdpa", **inputs)
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_plain_forward_with_a_dynamic_cache(llama: Any) -> None:
    ids = torch.tensor([[5, 17, 42, 8, 3], [90, 33, 21, 54, 1]])
    expected = logits(llama, "eager", input_ids=ids)
    llama.set_attn_implementation("effllm")
    cache = transformers.DynamicCache(config=llama.config)
    parts = []
    with torch.no_grad():
        for columns in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
            parts.append(llama(input_ids=columns, **using(llama, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_plain_forward_does_not_copy_keys(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from effllm import ops

    seen: list[Tensor] = []
    real_op = ops.paged_attention

    def spy(q: Tensor, k_cache: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(k_cache)
        return real_op(q, k_cache, *args, **kwargs)

    monkeypatch.setattr(ops, "paged_attention", spy)
    key = torch.randn(2, 2, 9, 16)
    effllm_attention(llama.model.layers[0].self_attn, torch.randn(2, 4, 9, 16), key, key, None)
    assert seen[0].data_ptr() == key.data_ptr()
    assert seen[0].shape == (2, 9, 2, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
    ],
    ids=["greedy", "beams", "several", "sampled"],
)
@pytest.mark.parametrize("page_size", [1, 4])
def test_generate_on_our_pages(llama: Any, arguments: dict[str, Any], page_size: int) -> None:
    inputs = padded(PROMPTS, "left")
    arguments = {**inputs, "max_new_tokens": 12, "do_sample": False, **arguments}
    torch.manual_seed(1)
    expected = llama.generate(**arguments)
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=32, page_size=page_size)
    torch.manual_seed(1)
    assert torch.equal(llama.generate(**arguments, **using(llama, cache)), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    # Padding is never stored.
    assert [cache.pages.length(seq) for seq in cache._seqs][:1] == [len(PROMPTS[0]) + 11]


def test_generate_without_our_cache(llama: Any) -> None:
    inputs = padded(PROMPTS, "left")
    expected = llama.generate(**inputs, max_new_tokens=8, do_sample=False)
    llama.set_attn_implementation("effllm")
    assert torch.equal(llama.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_generate_with_a_static_cache(llama: Any) -> None:
    inputs = padded(PROMPTS, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    expected = llama.generate(**inputs, **options)
    llama.set_attn_implementation("effllm")
    static = llama.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, expected)


def test_assisted_decoding_crops_the_pages(llama: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = llama.generate(ids, **options)
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=64, page_size=4)
    ours = llama.generate(ids, **options, prompt_lookup_num_tokens=3, **using(llama, cache))
    assert torch.equal(ours, expected)


def test_crop_reorder_and_select_are_exact(llama: Any) -> None:
    ids = torch.tensor([[5, 17, 42, 8, 3, 9], [90, 33, 21, 54, 1, 2]])
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=16, max_batch=4, page_size=4)
    with torch.no_grad():
        llama(input_ids=ids, **using(llama, cache))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        follow = torch.tensor([[7, 7], [8, 8], [9, 9]])
        ours = llama(input_ids=follow, **using(llama, cache)).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        again = llama(input_ids=ids[:1], **using(llama, cache)).logits
    whole = torch.cat([ids[[1, 0, 0], :3], follow], 1)
    expected = logits(llama, "eager", input_ids=whole)[:, 3:]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        again, logits(llama, "eager", input_ids=ids[:1]), rtol=1e-4, atol=1e-4
    )


def test_the_paged_context_keyword(llama: Any) -> None:
    """Prefill of two sequences and a mixed step, packed as [1, T]."""
    llama.set_attn_implementation("effllm")
    cache = PagedKVCache(3, 2, 16, max_batch=3, max_seq_len=16, page_size=4, dtype=torch.float32)
    a, b = cache.add(), cache.add()
    whole_a, whole_b = PROMPTS[0], PROMPTS[2]

    def step(*parts: tuple[int, list[int]]) -> Tensor:
        batch = cache.step([(seq, len(tokens)) for seq, tokens in parts])
        with torch.no_grad():
            return llama(
                input_ids=torch.tensor([[t for _, tokens in parts for t in tokens]]),
                position_ids=batch.positions[None],
                effllm=PagedContext(cache, batch),
                use_cache=False,
            ).logits[0]

    first = step((a, whole_a[:3]), (b, whole_b[:2]))
    second = step((b, whole_b[2:]), (a, whole_a[3:]))
    expected_a = logits(llama, "eager", input_ids=torch.tensor([whole_a]))[0]
    expected_b = logits(llama, "eager", input_ids=torch.tensor([whole_b]))[0]
    for ours, expected in [
        (first[:3], expected_a[:3]),
        (first[3:], expected_b[:2]),
        (second[:2], expected_b[2:]),
        (second[2:], expected_a[3:]),
    ]:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks(llama: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    expected = logits(llama, "effllm", input_ids=ids)
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad():
        out = compiled(input_ids=ids, **using(llama, cache)).logits
    torch.testing.assert_close(out, expected)


def test_a_backward_pass_raises(llama: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    llama.set_attn_implementation("effllm")
    for arguments in ({}, using(llama, PagedCache(llama.config, max_seq_len=8))):
        loss = llama(input_ids=ids, labels=ids, **arguments).loss
        with pytest.raises(RuntimeError, match="paged_attention is an inference op"):
            loss.backward()


@pytest.mark.gpu
def test_gpu_forward(llama: Any) -> None:
    model = llama.to("cuda", torch.bfloat16)
    inputs = {key: value.cuda() for key, value in padded(PROMPTS, "left").items()}
    real = inputs["attention_mask"].bool()
    ours = logits(model, "effllm", **inputs)[real].float()
    theirs = logits(model, "sdpa", **inputs)[real].float()
    exact = logits(model.float(), "sdpa", **inputs)[real]
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3 * exact.norm()


def tiny(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_sliding_window() -> None:
    model = tiny(transformers.MistralConfig(**TINY, sliding_window=4))
    inputs = padded(PROMPTS, "left")
    options = {**inputs, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**options)
    model.set_attn_implementation("effllm")
    assert torch.equal(model.generate(**options), expected)
    cache = PagedCache(model.config, max_seq_len=32, page_size=4)
    assert torch.equal(model.generate(**options, **using(model, cache)), expected)


def test_softcap() -> None:
    model = tiny(
        transformers.Gemma2Config(
            **TINY, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
        )
    )
    ids = torch.tensor([[5, 17, 42, 8, 3, 9, 12]])
    ours, theirs = logits(model, "effllm", input_ids=ids), logits(model, "eager", input_ids=ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bidirectional_encoder() -> None:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    inputs = padded(PROMPTS, "right")
    real = inputs["attention_mask"].bool()
    hidden = []
    for implementation in ("effllm", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            hidden.append(model(**inputs).last_hidden_state[real])
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_honoured_raises(llama: Any) -> None:
    ids = torch.tensor([[5, 17, 42, 8]])
    llama.set_attn_implementation("effllm")
    with pytest.raises(ValueError, match="2-D padding mask"):
        llama(input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="2-D padding mask"):
        llama(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
    q = torch.randn(1, 4, 3, 16)
    module = SimpleNamespace(is_causal=True)
    for name, value in [
        ("output_attentions", True),
        ("sinks", torch.ones(4)),
        ("position_bias", torch.ones(1, 4, 3, 3)),
    ]:
        with pytest.raises(ValueError, match=f"cannot honour {name}"):
            effllm_attention(module, q, q, q, None, **{name: value})
    with pytest.raises(ValueError, match=r"no dropout, got 0\.5"):
        effllm_attention(module, q, q, q, None, dropout=0.5)
    with pytest.raises(ValueError, match="has no layer_idx"):
        effllm_attention(module, q, q, q, None, effllm=PagedContext(None, None))


def test_chunked_masks_are_refused() -> None:
    from transformers.masking_utils import chunked_causal_mask_function

    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    refused = effllm_mask(1, 8, 8, mask_function=chunked)
    assert refused is not None
    assert refused.dim() == 4


def test_a_paged_cache_with_other_attention_raises(llama: Any) -> None:
    ids = torch.tensor([[5, 17, 42, 8]])
    llama.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match="needs attn_implementation='effllm', the model has 'sdpa'"
    ):
        llama(input_ids=ids, **using(llama, PagedCache(llama.config, max_seq_len=8)))
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=8)
    cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 0)
    with pytest.raises(RuntimeError, match="keys of layer 0 never reached the attention"):
        cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 1)


def test_a_mask_that_forgets_cached_tokens_raises(llama: Any) -> None:
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=16)
    with torch.no_grad():
        llama(input_ids=torch.tensor([[5, 17, 42]]), **using(llama, cache))
        with pytest.raises(ValueError, match="must repeat the columns already in the PagedCache"):
            llama(
                input_ids=torch.tensor([[8]]),
                attention_mask=torch.tensor([[0, 1, 1, 1]]),
                **using(llama, cache),
            )


@pytest.mark.parametrize(
    "statements",
    [
        "import effllm, importlib, sys\n"
        "importlib.reload(effllm)\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers",
        "import transformers, effllm",
        "import transformers; transformers.LlamaForCausalLM; import effllm",
    ],
    ids=["before", "lazily", "after"],
)
def test_registered_whatever_is_imported_first(statements: str) -> None:
    check = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks\n"
        "assert 'effllm' in attention and 'effllm' in masks"
    )
    subprocess.run([sys.executable, "-c", f"{statements}\n{check}"], check=True)
