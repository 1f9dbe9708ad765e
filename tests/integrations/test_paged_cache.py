"""PagedCache under transformers' beam search, assisted decoding and prompt reuse, token for token
against DynamicCache and transformers' own attention. fp32 on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import llama_config, using
from torch import Tensor

from effllm import ops
from effllm.cache import OutOfPages

transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

from effllm.integrations.transformers import PagedCache  # noqa: E402  (imports transformers)

# Rows of different lengths, left-padded with token 0.
IDS = torch.tensor(
    [
        [0, 0, 5, 17, 42, 8, 3, 77, 61],
        [0, 0, 0, 0, 0, 0, 0, 11, 2],
        [13, 90, 33, 21, 54, 7, 7, 7, 19],
    ]
)
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def generate(model: Any, implementation: str, cache: Any, **options: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    torch.manual_seed(5)
    return model.generate(**options, **using(model, cache))


def compare(model: Any, page_size: int = 4, **options: Any) -> PagedCache:
    """Both caches give the same tokens; returns ours."""
    dynamic = transformers.DynamicCache(config=model.config)
    expected = generate(model, "eager", dynamic, **options)
    ours = PagedCache(model.config, max_seq_len=64, page_size=page_size)
    assert torch.equal(generate(model, "effllm", ours, **options), expected)
    assert ours.get_seq_length() == dynamic.get_seq_length()
    return ours


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_return_sequences": 4, "length_penalty": 2.0},
        {"early_stopping": True, "eos_token_id": list(range(3, 90, 7))},
        {"do_sample": True, "top_k": 20},
    ],
    ids=["plain", "all-returned", "rows-that-end", "sampled"],
)
def test_four_beams(llama: Any, options: dict[str, Any], page_size: int) -> None:
    options = {"do_sample": False, **options}
    cache = compare(llama, page_size, **INPUTS, num_beams=4, max_new_tokens=14, **options)
    assert len(cache._seqs) == 3 * 4


def test_beams_share_their_past_and_copy_one_page_each(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[int, int]] = []
    real_op = ops.block_copy

    def spy(caches: list[Tensor], src: Tensor, dst: Tensor) -> None:
        copies.append((len(caches), len(src)))
        real_op(caches, src, dst)

    monkeypatch.setattr(ops, "block_copy", spy)
    prompt = {"input_ids": torch.arange(1, 42)[None]}
    cache = compare(llama, 4, **prompt, num_beams=4, max_new_tokens=8, do_sample=False)
    # One call per step at most, for all layers; no beam copies more than the page it writes to.
    assert 0 < len(copies) <= 7
    assert all(num_caches == 6 and 1 <= pages <= 3 for num_caches, pages in copies)
    # The first ten pages are full with the prompt: all beams hold the same ones.
    assert len({cache.pages.pages(seq)[:10] for seq in cache._seqs}) == 1


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("layers", [1, 3])
def test_assisted_decoding(llama: Any, layers: int, page_size: int) -> None:
    """An assistant that is nearly always wrong, and one that is the model itself."""
    torch.manual_seed(0)
    assistant = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=layers)).eval()
    compare(llama, page_size, input_ids=IDS[2:], max_new_tokens=20, assistant_model=assistant)


def test_assistant_on_our_attention(llama: Any) -> None:
    assistant = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=1)).eval()
    assistant.set_attn_implementation("effllm")
    compare(llama, input_ids=IDS[2:], max_new_tokens=12, assistant_model=assistant)


def test_rows_repeated_and_selected_between_steps(llama: Any) -> None:
    """What contrastive search and samplers do to a cache, padding included; then a crop."""
    ours = PagedCache(llama.config, max_seq_len=32, max_batch=6, page_size=4)
    theirs = transformers.DynamicCache(config=llama.config)
    follow = torch.arange(20, 32).view(4, 3)
    results = []
    for implementation, cache in (("effllm", ours), ("eager", theirs)):
        llama.set_attn_implementation(implementation)
        mask = INPUTS["attention_mask"]
        with torch.no_grad():
            llama(**INPUTS, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **using(llama, cache))
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
            cache.batch_select_indices(torch.tensor([0, 5, 3, 3]))
            cache.crop(-2)
            mask = torch.cat([mask[[2, 0, 1, 1], :-2], torch.ones(4, 3, dtype=torch.long)], 1)
            logits = llama(
                input_ids=follow,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -3:],
                **using(llama, cache),
            ).logits
        results.append(logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_copies_continue_one_prompt_each_on_its_own(llama: Any) -> None:
    prompt = torch.arange(1, 11)[None]
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=24, max_batch=3, page_size=4)
    with torch.no_grad():
        llama(input_ids=prompt, **using(llama, cache))
    free = cache.pages.pool.num_free
    copies = []
    for question in ([50, 51, 52], [60], [70, 71, 72, 73]):
        ids = torch.cat([prompt, torch.tensor([question])], 1)
        expected = generate(llama, "eager", None, input_ids=ids, max_new_tokens=6, do_sample=False)
        own = copy.deepcopy(cache)
        ours = generate(llama, "effllm", own, input_ids=ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours, expected)
        # Two full pages of the prompt are shared, the third is copied.
        assert own.pages.pages(own._seqs[0])[:2] == cache.pages.pages(cache._seqs[0])[:2]
        copies.append(own)
        if len(copies) == 2:
            copies.clear()  # dropped, they give their pages back at once
            del own
            assert cache.pages.pool.num_free == free
    assert cache.get_seq_length() == 10
    own.reset()
    copies.clear()
    assert cache.pages.pool.num_free == free
    expected = generate(llama, "eager", None, input_ids=prompt, max_new_tokens=6, do_sample=False)
    cache.crop(-1)
    ours = generate(llama, "effllm", cache, input_ids=prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, expected)


def test_a_copy_of_an_unused_cache(llama: Any) -> None:
    own = copy.deepcopy(PagedCache(llama.config, max_seq_len=24, page_size=4))
    options = {"input_ids": IDS[2:], "max_new_tokens": 6, "do_sample": False}
    expected = generate(llama, "eager", None, **options)
    assert torch.equal(generate(llama, "effllm", own, **options), expected)


def test_running_out_of_pages_changes_nothing(llama: Any) -> None:
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=16, max_batch=1, page_size=4)

    def forward(to: PagedCache, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return llama(input_ids=ids, **using(llama, to)).logits

    # A first step that fails leaves no rows behind.
    for ids, error in ((IDS[1:, -4:], "max_batch=1"), (IDS[2:].repeat(1, 2), "max_seq_len is 16")):
        with pytest.raises(ValueError, match=error):
            forward(cache, ids)
        assert cache.get_seq_length() == 0
    prompt, rest = IDS[2:, :6], IDS[2:, 6:]
    forward(cache, prompt)
    # Four pages in all: two hold the prompt, a copy needs one for its own last page.
    others = [copy.deepcopy(cache) for _ in range(2)]
    first = forward(others[0], rest)
    with pytest.raises(OutOfPages, match="needed 2 pages, found 0 free"):
        forward(others[1], rest)
    assert (others[1].get_seq_length(), cache.get_seq_length()) == (6, 6)
    del others[0]
    assert torch.equal(forward(others[0], rest), first)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        expected = llama(input_ids=IDS[2:]).logits[:, 6:]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_exist_or_do_not_fit_change_nothing(llama: Any) -> None:
    llama.set_attn_implementation("effllm")
    cache = PagedCache(llama.config, max_seq_len=32, max_batch=3, page_size=4)
    with torch.no_grad():
        llama(**INPUTS, **using(llama, cache))
    seqs, free = list(cache._seqs), cache.pages.pool.num_free
    with pytest.raises(ValueError, match="has room for max_batch=3 sequences, got 6"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 1, 3]))
    assert (cache._seqs, cache.pages.pool.num_free) == (seqs, free)
    assert set(cache.pages._seqs) == set(seqs)


def test_a_wrong_kv_dtype_is_refused_before_the_first_token(llama: Any) -> None:
    with pytest.raises(
        ValueError, match="PagedCache: kv_dtype must be e4m3, int8, int4 or None, got 'fp4'"
    ):
        PagedCache(llama.config, max_seq_len=8, kv_dtype="fp4")
