"""generate(cache_policy=...) against plain-PyTorch policies with the dense attention matrix, and
against the full cache. fp32 on the CPU, where the ops add up what the full cache's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import llama_config
from torch import Tensor

import effllm
from effllm._host import TokenTree
from effllm.cache import (
    H2O,
    TOVA,
    CachePolicy,
    EvictingKVCache,
    Full,
    OutOfPages,
    PagedBatch,
    PagedKVCache,
    SnapKV,
    StreamingLLM,
)
from effllm.generation import step_graph
from effllm.generation.paged_model import PagedModel, effllm_attention, fitting_cache
from effllm.ops._kv_codes import as_bits
from effllm.speculative import NGramDraft

transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

from dense_policies import DensePolicy  # noqa: E402  (imports transformers)

POLICIES: dict[str, tuple[CachePolicy, dict[str, Any]]] = {
    "h2o": (H2O(48, 12), {"kind": "h2o", "budget": 48, "recent": 12}),
    "h2o-normalized": (
        H2O(40, 8, 3, normalize=True),
        {"kind": "h2o", "budget": 40, "recent": 8, "n_sink": 3, "normalize": True},
    ),
    "streaming": (
        StreamingLLM(4, 36),
        {"kind": "streaming", "budget": 40, "recent": 36, "n_sink": 4},
    ),
    "window": (StreamingLLM(0, 24), {"kind": "streaming", "budget": 24, "recent": 24}),
    "rotated": (
        StreamingLLM(4, 60, rotate=True),
        {"kind": "rotated", "budget": 64, "recent": 60, "n_sink": 4},
    ),
    "snap": (SnapKV(40, 8, kernel=5), {"kind": "snap", "budget": 40, "recent": 8, "kernel": 5}),
    "snap-avg": (
        SnapKV(33, 8, kernel=3, pooling="avg"),
        {"kind": "snap", "budget": 33, "recent": 8, "kernel": 3, "pooling": "avg"},
    ),
    "tova": (TOVA(32), {"kind": "tova", "budget": 32}),
}
each_policy = pytest.mark.parametrize("name", POLICIES)


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(max_position_embeddings=8192)).eval()


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (length,), generator=generator).tolist()


def logits_of(paged: PagedModel, batch: PagedBatch, tokens: list[int]) -> Tensor:
    """After every token of a step, however many there are."""
    return paged._forward(batch, torch.tensor(tokens, device=batch.positions.device))[0]


class Stepper:
    """One sequence through the paged model, some tokens at a time."""

    def __init__(self, model: Any, policy: CachePolicy, prompt: int, decode: int) -> None:
        self.cache = fitting_cache(model, [policy.needed(prompt, decode)], None, policy)
        self.paged = PagedModel(model, self.cache)
        self.seq = self.cache.add()

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> Tensor:
        batch = self.cache.step([(self.seq, len(tokens))])
        with effllm_attention(self.paged.model):
            return logits_of(self.paged, batch, tokens)

    def kept(self, layer: int, head: int) -> set[int]:
        seq = self.cache._get(self.seq)
        assert seq.slots is not None
        positions = seq.slots.positions[layer, seq.slots.row, head, : seq.held].tolist()
        assert len(set(positions)) == len(positions)
        return set(positions)


@each_policy
def test_long_decoding_is_that_of_the_dense_matrix(llama: Any, name: str) -> None:
    """After a prompt, hundreds of tokens: the same tokens kept at each step, the same logits."""
    policy, reference = POLICIES[name]
    prompt, tokens = 60, text(400)
    slow = DensePolicy(llama, **reference)
    fast = Stepper(llama, policy, prompt, len(tokens) - prompt)
    different = 0
    for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
        expected = slow.feed(tokens[begin:end])
        actual = fast.feed(tokens[begin:end])
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
        if policy.decoding:
            for layer in range(3):
                sets = [fast.kept(layer, head) for head in range(2)]
                wanted = [slow.kept(layer, head) for head in range(2)]
                assert sets == wanted, f"layer {layer} after token {end}"
                different = max(different, len(sets[0] - sets[1]))
        assert fast.cache.length(fast.seq) == end  # tokens seen, and so the next position
    assert slow.smallest_gap > 1e-6, "choices that rounding decides show nothing"
    if reference["kind"] == "h2o":
        assert different > 8, "heads must have gone their own ways"
        assert fast.cache.evicted(fast.seq) == len(tokens) - policy.slots


@each_policy
def test_generated_text_is_that_of_the_dense_matrix(llama: Any, name: str) -> None:
    """Prompts that evict, that do not, and of one token; some end before others."""
    policy, reference = POLICIES[name]
    prompts = [text(57, 1), text(12, 2), text(1, 3), text(35, 4)]
    texts = []
    for prompt in prompts:
        slow, pending, tokens = DensePolicy(llama, **reference), prompt, []
        for _ in range(80):
            logits = slow.feed(pending)[-1]
            two = logits.topk(2)
            assert two.values[0] - two.values[1] > 1e-4, "a choice that rounding decides"
            pending = [int(two.indices[0])]
            tokens += pending
        texts.append(tokens)
    results = effllm.generate(llama, prompts, max_new_tokens=80, cache_policy=policy)
    assert [r.tokens for r in results] == texts
    stop = texts[1][20]
    results = effllm.generate(
        llama, prompts, max_new_tokens=80, cache_policy=policy, stop_tokens=[stop]
    )
    for result, whole in zip(results, texts, strict=True):
        assert result.tokens == whole[: whole.index(stop) + 1 if stop in whole else 80]


@each_policy
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_budget_as_long_as_the_text_is_the_full_cache(
    llama: Any, name: str, kv_dtype: str | None
) -> None:
    """To the bit, at each step, prompts included."""
    tokens, prompt = text(130), 70
    policy = {
        "h2o": H2O(130, 20, 2),
        "h2o-normalized": H2O(130, 130, normalize=True),
        "streaming": StreamingLLM(4, 126),
        "window": StreamingLLM(0, 130),
        "rotated": StreamingLLM(4, 126, rotate=True),
        "snap": SnapKV(70, 8),
        "snap-avg": SnapKV(200, 8, pooling="avg"),
        "tova": TOVA(130),
    }[name]
    if policy.rotates and kv_dtype is not None:
        with pytest.raises(ValueError, match="rotates keys needs inv_freq and a cache without"):
            fitting_cache(llama, [10], kv_dtype, policy)
        return
    logits = []
    for cache in (
        fitting_cache(llama, [130], kv_dtype),
        fitting_cache(llama, [130], kv_dtype, policy),
    ):
        assert isinstance(cache, EvictingKVCache) == (len(logits) > 0)
        paged, seq, steps = PagedModel(llama, cache), cache.add(), []
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 130))]:
            batch = cache.step([(seq, end - begin)])
            with effllm_attention(llama), torch.no_grad():
                steps.append(logits_of(paged, batch, tokens[begin:end]))
        logits.append(torch.cat(steps))
    assert torch.equal(*logits)
    full = effllm.generate(llama, [tokens[:60], tokens[:9]], max_new_tokens=9, kv_dtype=kv_dtype)
    kept = effllm.generate(
        llama, [tokens[:60], tokens[:9]], max_new_tokens=9, kv_dtype=kv_dtype, cache_policy=policy
    )
    assert kept == full


def test_full_is_the_paged_cache(llama: Any) -> None:
    expected = effllm.generate(llama, [text(40)], max_new_tokens=10)
    assert effllm.generate(llama, [text(40)], max_new_tokens=10, cache_policy=Full()) == expected
    assert type(fitting_cache(llama, [5], None, Full())) is PagedKVCache


@pytest.mark.parametrize("kv_dtype", ["e4m3", "int8", "int4"])
@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_codes_move_with_their_scales(llama: Any, name: str, kv_dtype: str) -> None:
    """What stays of a prompt are the bytes that the full cache holds at the same positions."""
    policy, tokens = POLICIES[name][0], text(80)
    full = fitting_cache(llama, [80], kv_dtype)
    some = fitting_cache(llama, [80], kv_dtype, policy)
    assert isinstance(some, EvictingKVCache)
    for cache in (full, some):
        with torch.no_grad(), effllm_attention(llama):
            PagedModel(llama, cache).step([(cache.add(), tokens)])
    slots = some._get(0).slots
    assert slots is not None
    slot = torch.arange(policy.slots or 0)
    for layer in range(3):
        for ours, whole in zip(some.layer(layer), full.layer(layer), strict=True):
            assert ours is not None
            assert whole is not None
            for head in range(2):
                at = slots.positions[layer, 0, head].long()
                rows = [
                    as_bits(cache)[torch.tensor(pages)[index // 16], index % 16, head]
                    for cache, pages, index in (
                        (ours, some.pages(0), slot),
                        (whole, full.pages(0), at),
                    )
                ]
                assert torch.equal(*rows)


def test_streaming_reads_a_prompt_as_it_decodes(llama: Any) -> None:
    """One step of 150 tokens, or 150 steps; then a second prompt behind evicted tokens."""
    policy, tokens = StreamingLLM(4, 36), text(230)
    at_once, one_by_one = (Stepper(llama, policy, 150, 80) for _ in range(2))
    one = torch.cat([one_by_one.feed([token]) for token in tokens])
    parts = [tokens[:150], *([t] for t in tokens[150:160]), tokens[160:190]]
    whole = torch.cat([at_once.feed(part) for part in parts])
    torch.testing.assert_close(whole, one[:190], rtol=1e-3, atol=1e-3)
    for layer in range(3):
        assert at_once.kept(layer, 0) == {0, 1, 2, 3, *range(154, 190)}


@pytest.mark.parametrize("name", ["h2o", "h2o-normalized", "tova", "snap"])
def test_a_second_prompt_behind_evicted_tokens(llama: Any, name: str) -> None:
    policy, reference = POLICIES[name]
    tokens = text(220)
    slow, fast = DensePolicy(llama, **reference), Stepper(llama, policy, 160, 60)
    parts = [tokens[:70], *([t] for t in tokens[70:120]), tokens[120:170]]
    parts += [[t] for t in tokens[170:]]
    for part in parts:
        torch.testing.assert_close(fast.feed(part), slow.feed(part), rtol=2e-3, atol=2e-3)


def test_text_beyond_what_the_model_reads(llama: Any) -> None:
    """Rotated sinks: distances stay as they are, so that texts need not end; others must."""
    llama.config.max_position_embeddings = 96
    policy = StreamingLLM(4, 60, rotate=True)
    (result,) = effllm.generate(llama, [text(40)], max_new_tokens=300, cache_policy=policy)
    assert len(result.tokens) == 300
    for other in (StreamingLLM(4, 60), H2O(64, 8)):
        with pytest.raises(ValueError, match="exceeds the model's context of 96"):
            effllm.generate(llama, [text(40)], max_new_tokens=300, cache_policy=other)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kept"), [("h2o", 3), ("streaming", 3), ("snap", 4), ("tova", 2)])
def test_pages_of_evicted_prompts_return(llama: Any, name: str, kept: int) -> None:
    """After a prompt of 200 tokens on 13 pages; those of SnapKV that 20 tokens more need stay."""
    policy = POLICIES[name][0]
    cache = fitting_cache(llama, [policy.needed(200, 20)], None, policy)
    free, paged, seq = cache.pool.num_free, PagedModel(llama, cache), cache.add()
    cache.reserve(seq, 200, 20)
    assert cache.pool.num_free == free - 13
    with torch.no_grad(), effllm_attention(llama):
        tokens = text(220)
        paged.step([(seq, tokens[:200])])
        assert cache.pool.num_free == free - kept
        for token in tokens[200:]:
            paged.step([(seq, [token])])
            assert len(cache.pages(seq)) == kept  # and so none can be missing
    assert cache.length(seq) == 220
    cache.free(seq)
    assert cache.pool.num_free == free


def test_prefixes_are_shared_until_the_first_eviction(llama: Any) -> None:
    """The pages that another text may find stay as they are; texts are those of a fresh cache."""
    policy, prompt = StreamingLLM(4, 60), text(64)
    cache = fitting_cache(llama, [200, 200, 200], None, policy)
    first, again = ([prompt], [prompt[:50] + text(9, 7), prompt])
    expected = [
        effllm.generate(llama, prompts, max_new_tokens=40, cache_policy=policy)
        for prompts in (first, again)
    ]
    short = effllm.generate(llama, [prompt[:60]], max_new_tokens=2, cache=cache)
    assert cache.pool.num_committed == 3  # of a text that has evicted nothing
    seq = cache.add(prompt)
    pages = cache.pages(seq)
    assert cache.length(seq) == 48
    before = [t[list(pages)].clone() for t in (*cache.k, *cache.v)]
    for prompts, wanted in zip((first, again), expected, strict=True):
        assert effllm.generate(llama, prompts, max_new_tokens=40, cache=cache) == wanted
    after = [t[list(pages)] for t in (*cache.k, *cache.v)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.pool.num_committed == 3, "a text that has evicted offers nothing"
    assert effllm.generate(llama, [prompt[:60]], max_new_tokens=2, cache=cache) == short


def test_a_prefix_is_reused_as_far_as_its_queries_do_not_count(llama: Any) -> None:
    prompt = text(64)
    for policy, reused in ((H2O(128, 8), 0), (SnapKV(128, 20), 32), (TOVA(128), 48)):
        cache = fitting_cache(llama, [128], None, policy)
        effllm.generate(llama, [prompt], max_new_tokens=2, cache=cache)
        assert cache.pool.num_committed == 4
        assert cache.length(cache.add(prompt)) == reused


def test_a_prompt_that_is_found_but_for_a_token_goes_beside_others(llama: Any) -> None:
    """The rest of it must still be fed as a prompt: the budget is full."""
    policy, prompt = StreamingLLM(4, 60), text(64)
    prompts = [[*prompt, 5], text(10, 9)]
    expected = effllm.generate(llama, prompts, max_new_tokens=8, cache_policy=policy)
    cache = fitting_cache(llama, [80, 80], None, policy)
    effllm.generate(llama, [prompt], max_new_tokens=1, cache=cache)
    assert cache.pool.num_committed == 4
    assert effllm.generate(llama, prompts, max_new_tokens=8, cache=cache) == expected


@each_policy
def test_forks_swaps_and_reorders_go_their_own_ways(llama: Any, name: str) -> None:
    """Each branch of a text gets what it would get alone."""
    policy, reference = POLICIES[name]
    trunk, branches = text(62), [text(60, 5), text(60, 6)]
    cache = fitting_cache(llama, [130, 130, 130], None, policy)
    paged, free = PagedModel(llama, cache), cache.pool.num_free
    seqs = [cache.add()]

    def feed(parts: list[list[int]]) -> Tensor:
        with torch.no_grad(), effllm_attention(llama):
            return paged.step(list(zip(seqs, parts, strict=True))).logits

    feed([trunk])
    seqs.append(cache.fork(seqs[0]))
    slow = [DensePolicy(llama, **reference) for _ in branches]
    for one in slow:
        one.feed(trunk)
    for step, tokens in enumerate(zip(*branches, strict=True)):
        if step == 20:
            cache.swap_out(seqs[0])
            cache.swap_in(seqs[0])
        if step == 40:  # and each takes the other's place
            cache.reorder(seqs, [1, 0])
            seqs.reverse()
        actual = feed([[token] for token in tokens])
        expected = torch.cat([one.feed([t]) for one, t in zip(slow, tokens, strict=True)])
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    for seq in seqs:
        cache.free(seq)
    assert cache.pool.num_free == free


def test_a_step_that_fails_changes_nothing(llama: Any) -> None:
    """A shared page cannot be copied for the first eviction: the pool is empty."""
    policy = StreamingLLM(2, 14)
    cache = EvictingKVCache(
        policy, 3, 2, 16, max_batch=2, max_seq_len=16, num_pages=2, dtype=torch.float32
    )
    paged, seq = PagedModel(llama, cache), cache.add()
    with torch.no_grad(), effllm_attention(llama):
        paged.step([(seq, text(16))])
    other = cache.fork(seq)
    before = dict(cache._seqs)
    for _ in range(2):
        with pytest.raises(OutOfPages):
            cache.step([(seq, 1)])
        state = [seq_._replace(slots=None) for seq_ in cache._seqs.values()]
        assert state == [seq_._replace(slots=None) for seq_ in before.values()]
    cache.free(other)
    cache.step([(seq, 1)])
    assert (cache.length(seq), cache.evicted(seq)) == (17, 1)


# ---- errors --------------------------------------------------------------------------------------


def test_what_does_not_go_with_a_policy(llama: Any) -> None:
    policy, prompt = H2O(32, 8), text(40)
    with pytest.raises(ValueError, match=r"draft must be None with a cache_policy.*NGramDraft"):
        effllm.generate(llama, [prompt], cache_policy=policy, draft=NGramDraft())
    cache = fitting_cache(llama, [100], None, policy)
    with pytest.raises(
        ValueError, match="cache_policy must be None with a cache, which has its own"
    ):
        effllm.generate(llama, [prompt], cache_policy=policy, cache=cache)
    for given in ({"cache_policy": policy}, {"cache": cache}):
        with pytest.raises(ValueError, match="cuda_graphs must be False or None with a cache_pol"):
            effllm.generate(llama, [prompt], cuda_graphs=True, **given)
    rotated = StreamingLLM(4, 20, rotate=True)
    with pytest.raises(ValueError, match="prompts up to 24 tokens and then one at a time"):
        effllm.generate(llama, [prompt], cache_policy=rotated)
    llama.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="no rotary embedding whose keys can be rotated on"):
        effllm.generate(llama, [prompt[:9]], cache_policy=rotated)


def test_a_model_whose_steps_can_be_graphs_runs_without(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's step is padded, which a cache that evicts refuses."""
    expected = effllm.generate(llama, [text(40)], max_new_tokens=10, cache_policy=H2O(32, 8))
    monkeypatch.setattr(step_graph, "graph_problem", lambda model: None)
    for graphs in (None, False):
        assert expected == effllm.generate(
            llama, [text(40)], max_new_tokens=10, cache_policy=H2O(32, 8), cuda_graphs=graphs
        )


def test_steps_and_crops_that_eviction_forbids(llama: Any) -> None:
    fast = Stepper(llama, H2O(16, 8), 40, 4)
    fast.feed(text(16))
    with pytest.raises(ValueError, match="length must be 0 or at least 16, got 12"):
        fast.cache.crop(fast.seq, 12)
    other = fast.cache.add()
    fast.cache.max_batch = 2
    with pytest.raises(ValueError, match=r"must evict to decode one token.*\[1, 5\]"):
        fast.cache.step([(fast.seq, 1), (other, 5)])
    batch = fast.cache.step([(fast.seq, 1)])
    with pytest.raises(ValueError, match="a cache that evicts takes no trees"):
        batch.with_trees([TokenTree.chain([1])])
    for padding in ({"num_rows": 2}, {"num_tokens": 4}):
        with pytest.raises(ValueError, match="num_rows and num_tokens must be None"):
            fast.cache.step([(fast.seq, 1)], **padding)

    stream = Stepper(llama, StreamingLLM(2, 14), 16, 40)
    tokens = text(40)
    expected = stream.feed(tokens[:12])[8:]
    stream.cache.crop(stream.seq, 8)  # nothing was evicted yet
    torch.testing.assert_close(stream.feed(tokens[8:12]), expected)
    for token in tokens[12:20]:
        stream.feed([token])
    with pytest.raises(ValueError, match="length must be 0 or at least 20, got 19"):
        stream.cache.crop(stream.seq, 19)
    kept = stream.cache.pages(stream.seq)
    stream.cache.crop(stream.seq, 0, keep_pages=True)  # 20 tokens seen, in pages of 14
    assert stream.cache.pages(stream.seq) == kept
    stream.cache.crop(stream.seq, 0)
    assert stream.cache.pages(stream.seq) == ()
    torch.testing.assert_close(stream.feed(tokens[:12])[8:], expected)


def test_sliding_windows_must_see_what_is_kept() -> None:
    config = llama_config().to_dict() | {"sliding_window": 32, "layer_types": None}
    config = transformers.MistralConfig(**{k: v for k, v in config.items() if k != "model_type"})
    model = transformers.MistralForCausalLM(config).eval()
    effllm.generate(model, [text(20)], max_new_tokens=12, cache_policy=H2O(16, 8))
    with pytest.raises(ValueError, match="got a sliding window of 32 tokens at length 40"):
        effllm.generate(model, [text(40)], max_new_tokens=9, cache_policy=H2O(16, 8))
