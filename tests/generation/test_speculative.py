"""effllm.generate with drafts: greedy text as without, limits, stops, streams and caches."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from scripted_draft import Scripted, chain_of, random_tree, root_alone, still_to_come

import effllm
from effllm.cache import OutOfPages, PagedKVCache
from effllm.speculative import (
    DraftRequest,
    MedusaDraft,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    TokenTree,
)

VOCAB = 97
PROMPTS = [
    [5, 17, 42, 8, 3, 77, 61],
    [11],
    [90, 33, 21, 54],
    list(range(1, 41)),  # more than two pages
    [7, 8, 7, 8, 7, 8, 7],
]


def tokens_of(results: list[effllm.Generation]) -> list[list[int]]:
    return [result.tokens for result in results]


def whole_texts(results: list[effllm.Generation]) -> list[list[int]]:
    return [prompt + r.tokens for prompt, r in zip(PROMPTS, results, strict=True)]


def wrong(request: DraftRequest, texts: list[list[int]]) -> TokenTree:
    """A chain of which no token is right."""
    return chain_of(request, [(token + 1) % VOCAB for token in still_to_come(request, texts)])


@pytest.mark.parametrize("nodes", [2, 5, 64])
@pytest.mark.parametrize("new_tokens", [1, 2, 23])
def test_all_accepted(llama: Any, nodes: int, new_tokens: int) -> None:
    """Each step says as many tokens as its chain has nodes; none goes over the limit."""
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=new_tokens)
    texts = whole_texts(plain)
    draft = Scripted(lambda request: chain_of(request, still_to_come(request, texts)))
    results = effllm.generate(llama, PROMPTS, max_new_tokens=new_tokens, draft=draft, tree=nodes)
    assert tokens_of(results) == tokens_of(plain)
    assert {r.finish_reason for r in results} == {"length"}
    assert {r.steps for r in plain} == {new_tokens}
    # The first step has no draft yet.
    assert {r.steps for r in results} == {1 + -(-(new_tokens - 1) // nodes)}
    for asked in draft.asked:
        assert all(request.max_nodes == nodes for request in asked)
        assert all(len(r.text) + r.max_depth < len(PROMPTS[r.index]) + new_tokens for r in asked)


@pytest.mark.parametrize("make", [wrong, lambda request, texts: root_alone(request)])
def test_all_rejected_and_trees_of_one_node(
    llama: Any, make: Callable[[DraftRequest, list[list[int]]], TokenTree]
) -> None:
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=12)
    texts = whole_texts(plain)
    draft = Scripted(lambda request: make(request, texts))
    assert effllm.generate(llama, PROMPTS, max_new_tokens=12, draft=draft, tree=4) == plain


@pytest.mark.parametrize("kv_dtype", [None, "e4m3", "int4"])
@pytest.mark.parametrize("nodes", [3, 12, 64])
def test_random_trees(llama: Any, nodes: int, kv_dtype: str | None) -> None:
    """Of different sizes in one batch, half right; codes of quantised caches are moved as they are.

    Whatever is accepted, steps and tokens must agree with what the trees had of the text."""
    options: dict[str, Any] = {"max_new_tokens": 24, "kv_dtype": kv_dtype}
    plain = effllm.generate(llama, PROMPTS, **options)
    texts, random = whole_texts(plain), Random(nodes)
    made: list[tuple[DraftRequest, TokenTree]] = []

    def make(request: DraftRequest) -> TokenTree:
        made.append((request, random_tree(request, texts, random, VOCAB)))
        return made[-1][1]

    results = effllm.generate(llama, PROMPTS, draft=Scripted(make), tree=nodes, **options)
    assert tokens_of(results) == tokens_of(plain)
    assert any(tree.parents != list(range(-1, len(tree) - 1)) for _, tree in made)
    for index in range(len(PROMPTS)):
        mine = [(len(request.text), tree) for request, tree in made if request.index == index]
        ends = [length for length, _ in mine[1:]] + [len(texts[index])]
        for (length, tree), end in zip(mine, ends, strict=True):
            node = 0
            for token in texts[index][length : end - 1]:  # the last one is the model's own
                node = children_of(tree)[node, token]
            assert (node, texts[index][end - 1]) not in children_of(tree)
    assert sum(r.steps for r in results) < sum(r.steps for r in plain)


def children_of(tree: TokenTree) -> dict[tuple[int, int], int]:
    pairs = zip(tree.parents, tree.tokens, strict=True)
    return {pair: node for node, pair in enumerate(pairs)}


def drafts(llama: Any) -> dict[str, Any]:
    """Of each kind, for the tiny model; whatever they say is worth little."""
    torch.manual_seed(1)
    small = type(llama)(llama.config).eval()
    heads = MedusaHeads(64, VOCAB, num_heads=3, lm_head=llama.lm_head.weight)
    return {
        "n-gram": NGramDraft(max_ngram=2, max_draft=3),
        "n-gram, trees": NGramDraft(max_ngram=2, max_draft=2),
        "other model": ModelDraft(small, depth=3),
        "other model, trees": ModelDraft(small, depth=3, candidates=3),
        "itself": ModelDraft(llama, depth=3),
        "itself, trees": ModelDraft(llama, depth=2, candidates=2),
        "heads": MedusaDraft(heads, candidates=1),
        "heads, trees": MedusaDraft(heads),
    }


@pytest.mark.parametrize(
    "name",
    ["n-gram", "n-gram, trees", "other model", "other model, trees", "itself", "itself, trees",
     "heads", "heads, trees"],
)  # fmt: skip
def test_every_draft_leaves_greedy_text_as_it_is(llama: Any, name: str) -> None:
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=24)
    results = effllm.generate(llama, PROMPTS, max_new_tokens=24, draft=drafts(llama)[name], tree=4)
    assert tokens_of(results) == tokens_of(plain)
    if name == "itself":
        assert {r.steps for r in results} == {1 + -(-23 // 4)}
    for i, prompt in enumerate(PROMPTS):
        (alone,) = effllm.generate(
            llama, [prompt], max_new_tokens=24, draft=drafts(llama)[name], tree=4
        )
        assert alone == results[i]


@pytest.mark.parametrize("kv_dtype", ["e4m3", "int8", "int4"])
def test_quantised_targets_and_caches(llama: Any, kv_dtype: str) -> None:
    """int4 rows do not depend on the number of rows, and cached codes are moved as they are."""
    draft = ModelDraft(llama, depth=3)  # right as long as its own cache, in fp32, does not matter
    effllm.quantize_(llama, effllm.Int4Config(group_size=32))
    options: dict[str, Any] = {"max_new_tokens": 24, "kv_dtype": kv_dtype}
    plain = effllm.generate(llama, PROMPTS, **options)
    results = effllm.generate(llama, PROMPTS, draft=draft, tree=4, **options)
    assert tokens_of(results) == tokens_of(plain)
    assert sum(r.steps for r in results) < 0.7 * sum(r.steps for r in plain)


def test_stop_tokens_inside_an_accepted_path(llama: Any) -> None:
    free = effllm.generate(llama, PROMPTS, max_new_tokens=16)
    texts = whole_texts(free)
    for stop in {free[0].tokens[4], free[2].tokens[9]}:
        plain = effllm.generate(llama, PROMPTS, max_new_tokens=16, stop_tokens=[stop])
        for nodes in (2, 7, 16):
            calls: list[tuple[int, int]] = []
            results = effllm.generate(
                llama,
                PROMPTS,
                max_new_tokens=16,
                stop_tokens=[stop],
                draft=Scripted(lambda r: chain_of(r, still_to_come(r, texts))),
                tree=nodes,
                stream=lambda index, token, text, calls=calls: calls.append((index, token)),
            )
            assert tokens_of(results) == tokens_of(plain)
            assert [r.finish_reason for r in results] == [r.finish_reason for r in plain]
            # Nothing after a stop token is streamed either.
            for index, result in enumerate(results):
                assert [token for i, token in calls if i == index] == result.tokens


def given_cache(num_pages: int | None = None, max_seq_len: int = 64) -> PagedKVCache:
    return PagedKVCache(
        3, 2, 16, max_batch=5, max_seq_len=max_seq_len, page_size=4, num_pages=num_pages,
        dtype=torch.float32,
    )  # fmt: skip


def test_a_given_cache_shares_prefixes_and_is_left_clean(llama: Any) -> None:
    """What a rejected draft wrote is in no page that a later prompt finds."""
    cache = given_cache()
    free = cache.pool.num_free
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=8)
    texts = whole_texts(plain)
    random = Random(0)
    for make in (
        wrong,
        lambda r, t: chain_of(r, still_to_come(r, t)),
        lambda r, t: random_tree(r, t, random, VOCAB),
    ):
        for _ in range(2):
            draft = Scripted(lambda request, make=make: make(request, texts))
            results = effllm.generate(
                llama, PROMPTS, max_new_tokens=8, cache=cache, draft=draft, tree=6
            )
            assert tokens_of(results) == tokens_of(plain)
            assert cache.pool.num_free == free
        # All full pages of prompt and text, but not that of the last token, which was never fed.
        for text in texts:
            seq = cache.add([*text, 0])
            assert cache.length(seq) == (len(text) - 1) // 4 * 4
            cache.free(seq)
        followed = effllm.generate(llama, texts, max_new_tokens=4, cache=cache)
        assert tokens_of(followed) == tokens_of(effllm.generate(llama, texts, max_new_tokens=4))
        cache.reset()

    def broken(*call: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        effllm.generate(
            llama, PROMPTS, max_new_tokens=8, cache=cache, draft=NGramDraft(), stream=broken
        )
    assert cache.pool.num_free == free
    assert llama.config._attn_implementation == "sdpa"


def test_a_stop_inside_a_path_commits_only_the_text(llama: Any) -> None:
    cache = given_cache()
    free = effllm.generate(llama, PROMPTS, max_new_tokens=20)
    texts = whole_texts(free)
    stop = free[3].tokens[2]
    (result,) = effllm.generate(
        llama,
        PROMPTS[3:4],
        max_new_tokens=20,
        stop_tokens=[stop],
        cache=cache,
        draft=Scripted(lambda r: chain_of(r, texts[3][len(r.text) :])),
        tree=20,
    )
    assert result.tokens == free[3].tokens[: free[3].tokens.index(stop) + 1]
    assert result.steps == 2
    kept = PROMPTS[3] + result.tokens
    assert cache.length(cache.add(texts[3])) == len(kept) // 4 * 4


def test_trees_take_no_more_pages_than_are_left(llama: Any) -> None:
    """Whatever the pool has beyond the text, down to nothing; and never past max_seq_len."""
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=8)
    texts = whole_texts(plain)
    needed = sum(-(-(len(prompt) + 7) // 4) for prompt in PROMPTS)
    for spare in (0, 1, 3, 20):
        cache = given_cache(1 + needed + spare, max_seq_len=47)  # of the longest text but one
        draft = Scripted(lambda r: chain_of(r, still_to_come(r, texts)))
        results = effllm.generate(
            llama, PROMPTS, max_new_tokens=8, cache=cache, draft=draft, tree=9
        )
        assert tokens_of(results) == tokens_of(plain)
        assert cache.pool.num_free == needed + spare
    with pytest.raises(OutOfPages):
        effllm.generate(
            llama, PROMPTS, max_new_tokens=8, cache=given_cache(needed), draft=NGramDraft()
        )


def test_drafts_see_the_texts_and_the_states_behind_them(llama: Any) -> None:
    """Hidden states are those that the head chose the last token from, for any number accepted."""
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=12)
    texts = whole_texts(plain)
    random = Random(0)
    draft = Scripted(lambda r: random_tree(r, texts, random, VOCAB))
    effllm.generate(llama, PROMPTS, max_new_tokens=12, draft=draft, tree=6)
    for asked, hidden in zip(draft.asked, draft.hidden, strict=True):
        for request, state in zip(asked, hidden, strict=True):
            assert request.text == texts[request.index][: len(request.text)]
            ids = torch.tensor([request.text[:-1]])
            with torch.no_grad():
                expected = llama.model(ids, use_cache=False).last_hidden_state[0, -1]
            torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)


def test_a_draft_of_a_smaller_vocabulary_and_context(llama: Any) -> None:
    """Tokens that it does not know, and texts that it cannot read, get no drafts; no error."""
    from tiny_models import llama_config

    torch.manual_seed(2)
    small = type(llama)(llama_config(vocab_size=60, max_position_embeddings=20)).eval()
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=24)
    for candidates in (1, 3):
        draft = ModelDraft(small, depth=3, candidates=candidates)
        options: dict[str, Any] = {"max_new_tokens": 24, "draft": draft, "tree": 4}
        if candidates == 1:
            assert tokens_of(effllm.generate(llama, PROMPTS, **options)) == tokens_of(plain)
        results = effllm.generate(llama, PROMPTS, temperature=2.0, **options)
        assert {len(r.tokens) for r in results} == {24}


def test_n_grams_are_chains_up_to_as_many_nodes_as_they_draft() -> None:
    text = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2]  # two places to go on from

    def tree_of(max_nodes: int, max_depth: int) -> TokenTree:
        with NGramDraft(max_ngram=2, max_draft=3).session(None, [text]) as propose:
            request = DraftRequest(0, text, max_nodes, max_depth)
            return propose([request], torch.zeros(1, 1)).trees[0]

    for max_nodes, max_depth, tokens in (
        (4, 9, [2, 5, 6, 1]),
        (3, 9, [2, 5, 6]),
        (4, 1, [2, 5]),
        (4, 0, [2]),
        (1, 9, [2]),
    ):
        assert tree_of(max_nodes, max_depth).tokens == tokens
    wide = tree_of(7, 2)
    assert (wide.tokens, wide.parents) == ([2, 5, 6, 3, 4], [-1, 0, 1, 0, 3])


def test_no_prompts(llama: Any) -> None:
    assert effllm.generate(llama, [], draft=NGramDraft()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: TokenTree.chain([r.text[-1]] + [1] * 4), "at most 4 nodes .* got 5 nodes"),
        (lambda r: TokenTree.chain([(r.text[-1] + 1) % VOCAB]), "a tree on token"),
        (lambda r: TokenTree.chain([r.text[-1], VOCAB]), r"tokens in \[0, 97\), got .* to 97"),
    ],
)
def test_bad_drafts(llama: Any, make: Callable[[DraftRequest], TokenTree], message: str) -> None:
    with pytest.raises(ValueError, match=f"effllm.generate: Scripted must propose .*{message}"):
        effllm.generate(llama, PROMPTS, draft=Scripted(make), tree=4)


def test_bad_depth(llama: Any) -> None:
    draft = Scripted(lambda r: TokenTree.chain([r.text[-1], *[1] * (r.max_depth + 1)]))
    with pytest.raises(ValueError, match="and depth 2, got 4 nodes and depth 3"):
        effllm.generate(llama, [[1]], draft=draft, max_new_tokens=4)


def test_bad_options(llama: Any) -> None:
    for nodes in (1, 65):
        with pytest.raises(ValueError, match=rf"tree must be in \[2, 64\], got {nodes}"):
            effllm.generate(llama, PROMPTS, draft=NGramDraft(), tree=nodes)
    with pytest.raises(ValueError, match="ModelDraft: depth must be at least 1, got 0"):
        ModelDraft(llama, depth=0)
    with pytest.raises(ValueError, match="NGramDraft: max_ngram must be at least 1, got 0"):
        NGramDraft(max_ngram=0)
    heads = MedusaHeads(64, 96)
    with pytest.raises(ValueError, match=r"MedusaDraft: candidates must be .* \[1, 96\], got 97"):
        MedusaDraft(heads, candidates=97)
    with pytest.raises(ValueError, match=r"vocab_size, \(64, 97\), got \(64, 96\)"):
        effllm.generate(llama, PROMPTS, draft=MedusaDraft(heads))
