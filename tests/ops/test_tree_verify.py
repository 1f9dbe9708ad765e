"""tree_verify beyond the contract's cases: its laws, its numbers, edges, layouts, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm._host import TokenTree
from effllm.ops import tree_verify
from effllm.ops.tree_verify import _uniform
from effllm.testing import hostile
from effllm.testing.cases.tree_verify import TreeVerifyCase
from effllm.testing.compare import assert_equal
from effllm.testing.run import check_values

CASE = TreeVerifyCase(9, 12, 60, 1.2, 30, 0.9, drawn=True)
INF, NAN = math.inf, math.nan


@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        TreeVerifyCase,
        num_trees=st.integers(0, 6),
        num_nodes=st.integers(1, 20),
        vocab=st.integers(2, 50),
        temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 50.0]),
        top_k=st.sampled_from([0, 0, 1, 3, 100]),
        top_p=st.sampled_from([1.0, 1.0, 0.9, 0.4, 1e-6]),
        drawn=st.booleans(),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    )
)
def test_any_shape(case: TreeVerifyCase) -> None:
    check_values(tree_verify, case, "cpu")


def test_philox_gives_its_published_numbers() -> None:
    """Random123's known answers, of which the first two words become a number in [0, 1). That the
    op has the same ones, any sampled case shows."""
    for seed, position, draw, kind, words in (
        (0, 0, 0, 0, 0x6627E8D5_E169C58D),
        (-1, -1, 2**32 - 1, 2**32 - 1, 0x408F276D_41C83B0E),
        (0x299F31D0_A4093822, 0x85A308D3_243F6A88, 0x13198A2E, 0x03707344, 0xD16CFE09_94FDCCEB),
    ):
        assert _uniform(seed, position, draw, kind) == (words >> 11) / 2**53


def verify(
    trees: Sequence[TokenTree],
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor | None = None,
    device: str = "cpu",
    draft_probs: Tensor | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Accepted paths and next tokens; all trees with the same sampling."""
    count = len(trees)
    sizes = [0, *(len(tree) for tree in trees)]

    def nodes(name: str, dtype: torch.dtype) -> Tensor:
        values = [value for tree in trees for value in getattr(tree, name)]
        return torch.tensor(values, dtype=dtype, device=device)

    accept_index, num_accepted, next_token = tree_verify(
        logits.to(device),
        nodes("tokens", torch.int64),
        nodes("first_child", torch.int32),
        nodes("next_sibling", torch.int32),
        torch.tensor(sizes, device=device).cumsum(0).int(),
        torch.full((count,), temperature, device=device),
        torch.full((count,), top_k, dtype=torch.int32, device=device),
        torch.full((count,), top_p, device=device),
        (torch.arange(count) if seeds is None else seeds).to(device),
        torch.full((count,), 7, device=device),
        None if draft_probs is None else draft_probs.to(device),
        max_nodes=max(sizes),
    )
    paths = [row[:n] for row, n in zip(accept_index.tolist(), num_accepted.tolist(), strict=True)]
    return paths, next_token.tolist()


# The law of texts whose tokens follow each other by a table, of which drafts know a little.


def law_of(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """By lists: weights, the likeliest first, cut, normalised."""
    ranked = sorted(range(len(logits)), key=lambda x: (-logits[x], x))
    ranked = ranked[: top_k or None]
    weights = {x: math.exp(logits[x] / temperature) for x in ranked}
    total, reached = sum(weights.values()), 0.0
    for x in ranked:
        if reached >= top_p * total:
            del weights[x]
        else:
            reached += weights[x]
    return [weights.get(x, 0.0) / reached for x in range(len(logits))]


def chi_square(counts: Sequence[int], law: Sequence[float]) -> float:
    """How many standard deviations the statistic is above its mean, by its own distribution's."""
    total = sum(counts)
    possible = [(n, total * p) for n, p in zip(counts, law, strict=True) if p > 0]
    statistic = sum((n - expected) ** 2 / expected for n, expected in possible)
    freedom = max(len(possible) - 1, 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


VOCAB, START = 6, 0
TABLE = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
# The root has two children, its first child two more: one of depth 2 and one chain.
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 3])
FIRST, NEXT = [1, 3, -1, 5, -1, -1], [-1, 2, -1, 4, -1, -1]
DRAFT_LAW = (
    TABLE / 2 + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4))
).softmax(-1)


def draw_trees(count: int, drawn: str) -> Tensor:
    """Tokens [count, 6]. "certain": the same everywhere; "drawn" without replacement from the
    draft's law, in that order; "ranked": drawn, then the likelier sibling first."""
    if drawn == "certain":
        return torch.tensor([START, 1, 2, 4, 0, 3]).expand(count, 6)
    generator = torch.Generator().manual_seed(5)

    def draw(parents: Tensor, siblings: int) -> Tensor:
        law = DRAFT_LAW[parents]
        tokens = torch.multinomial(law, siblings, generator=generator)
        if drawn == "ranked":
            tokens = tokens.gather(1, law.gather(1, tokens).argsort(1, descending=True))
        return tokens

    root = torch.full((count, 1), START)
    upper = draw(root[:, 0], 2)
    lower = draw(upper[:, 0], 2)
    return torch.cat([root, upper, lower, draw(lower[:, 0], 1)], 1)


def texts(
    count: int, drawn: str, temperature: float, top_k: int, top_p: float, device: str
) -> list[list[int]]:
    """What ``count`` requests with seeds of their own say after one verification."""
    tokens = draw_trees(count, drawn)
    accept_index, num_accepted, next_token = tree_verify(
        TABLE[tokens.flatten()].to(device),
        tokens.flatten().to(device),
        torch.tensor(FIRST * count, dtype=torch.int32, device=device),
        torch.tensor(NEXT * count, dtype=torch.int32, device=device),
        torch.arange(0, 6 * count + 1, 6, dtype=torch.int32, device=device),
        torch.full((count,), temperature, device=device),
        torch.full((count,), top_k, dtype=torch.int32, device=device),
        torch.full((count,), top_p, device=device),
        torch.arange(count, device=device),
        torch.arange(count, device=device) % 11,
        None if drawn == "certain" else DRAFT_LAW[tokens.flatten()].to(device),
        max_nodes=6,
    )
    path = accept_index.cpu()
    said = tokens.gather(1, path.clamp(min=0).long()).masked_fill(path < 0, -1)
    said = torch.cat([said, torch.full((count, 1), -1)], 1)
    said.scatter_(1, num_accepted.cpu().long()[:, None], next_token.cpu()[:, None])
    return said[:, 1:]


def law_faults(said: Tensor, temperature: float, top_k: int, top_p: float) -> list[str]:
    """Where the token after START, or that after another accepted one, is not distributed as it
    would be without drafts. Each token but the last of a text was accepted, and has a successor."""
    faults = []
    before = torch.full((len(said), 1), START)
    pairs = torch.cat([before, said[:, :-1]], 1).flatten() * VOCAB + said.flatten()
    counts = torch.bincount(pairs[said.flatten() >= 0], minlength=VOCAB**2).view(VOCAB, VOCAB)
    for token, row in enumerate(counts.tolist()):
        law = law_of(TABLE[token].tolist(), temperature, top_k, top_p)
        if sum(row) == 0:
            continue
        impossible = [x for x in range(VOCAB) if law[x] == 0 and row[x] > 0]
        excess = chi_square(row, law)
        if impossible or excess > 6:
            faults.append(f"after {token}: {row} for {law}, {excess:.1f}, impossible {impossible}")
    return faults


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.3, 0, 0.8), (1.0, 5, 0.9)]
)
@pytest.mark.parametrize("drawn", ["certain", "drawn"])
def test_texts_have_the_law_of_plain_sampling(
    drawn: str, temperature: float, top_k: int, top_p: float, device: str
) -> None:
    """A million and more verifications over all laws; fixed seeds."""
    said = texts(160_000, drawn, temperature, top_k, top_p, device)
    assert law_faults(said, temperature, top_k, top_p) == []
    # Neither is nothing accepted, nor all of it.
    lengths = (said >= 0).sum(1)
    assert set(lengths.tolist()) == {1, 2, 3, 4}


def test_a_wrong_law_is_found() -> None:
    """Siblings in another order than drawn, as re-ranking leaves them, are no draws any more."""
    assert law_faults(texts(160_000, "ranked", 1.0, 0, 1.0, "cpu"), 1.0, 0, 1.0)
    # Nor does the law of one temperature pass for that of another.
    said = texts(160_000, "certain", 1.0, 0, 1.0, "cpu")
    assert law_faults(said, 0.95, 0, 1.0)


def test_tokens_without_probability_are_never_accepted(device: str) -> None:
    """Children that top_k leaves out, or whose logits are -inf, even if all are such."""
    logits = torch.tensor([[1.0, -INF, 0.9, 0.0, -INF, NAN]]).expand(3, 6)
    trees = [TokenTree([0, x, y], [-1, 0, 0]) for x, y in itertools.permutations((1, 3, 4, 5), 2)]
    everywhere = logits.repeat(len(trees) * 500, 1)
    for q in (None, torch.full_like(everywhere, 1 / 6)):
        paths, next_tokens = verify(
            trees * 500, everywhere, 1.0, top_k=2, device=device, draft_probs=q
        )
        assert paths == [[0]] * len(paths)
        assert set(next_tokens) == {0, 2}


def test_greedy_takes_the_lowest_of_equal_tokens(device: str) -> None:
    wide = torch.full((1, 3000), -1.0)
    wide[0, [1234, 40, 2999]] = 2.0
    rows: list[tuple[Tensor, int]] = [
        (torch.tensor([[3.0, 5.0, 5.0, 1.0]]), 1),
        (torch.tensor([[0.0, -0.0, 0.0, -1.0]]), 0),
        (torch.tensor([[-1.0, -0.0, 0.0, -1.0]]), 1),
        (torch.tensor([[NAN, -3.0, NAN, -INF]]), 1),
        (torch.tensor([[-INF, -INF, NAN, -INF]]), 0),
        (torch.tensor([[-INF, 1.0, INF, INF]]), 2),
        (wide, 40),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for row, expected in rows:
            _, tokens = verify([TokenTree([0], [-1])], row.to(dtype), device=device)
            assert tokens == [expected]
    # A child is accepted if it is that token, and no other of the same logit is.
    tree = TokenTree([0, 2, 1, 3], [-1, 0, 0, 2])
    logits = torch.tensor([[3.0, 5.0, 5.0, 1.0], *[[0.0, 0.0, 0.0, 9.0]] * 3])
    assert verify([tree], logits, device=device) == ([[0, 2, 3]], [3])


def test_infinite_and_equal_logits_when_sampling(device: str) -> None:
    trees = [TokenTree([0, 1], [-1, 0])] * 300
    for row, possible in (
        ([-INF, -INF, NAN], {0, 1, 2}),
        ([1.0, INF, INF], {1, 2}),
        ([2.0, NAN, -INF], {0}),
        ([3e38, 3e38, -3e38], {0, 1}),
    ):
        logits = torch.tensor([row]).expand(600, 3)
        paths, next_tokens = verify(trees, logits, 1e-3, device=device)
        said = [1 if len(p) > 1 else t for p, t in zip(paths, next_tokens, strict=True)]
        assert set(said) == possible


def test_ties_at_the_cut_keep_the_lower_tokens(device: str) -> None:
    """Five of eight equal tokens are in the nucleus of 0.6, the first three in the top 3."""
    logits = torch.zeros(2000, 8)
    trees = [TokenTree([0], [-1])] * 2000
    for top_k, top_p, kept in ((0, 0.6, 5), (3, 1.0, 3), (3, 0.6, 2), (8, 1.0, 8), (0, 0.5, 4)):
        _, tokens = verify(trees, logits, 1.0, top_k, top_p, device=device)
        assert set(tokens) == set(range(kept))


def test_chains_all_accepted_and_all_rejected(device: str) -> None:
    length, vocab = 64, 152064
    tokens = [(7919 * i) % vocab for i in range(length)]
    logits = torch.zeros(length, vocab, dtype=torch.bfloat16)
    logits[range(length - 1), tokens[1:]] = 60.0
    logits[-1, 99] = 60.0
    for temperature in (0.0, 0.9):
        paths, following = verify([TokenTree.chain(tokens)], logits, temperature, device=device)
        assert (paths, following) == ([list(range(length))], [99])
        wrong = TokenTree.chain([tokens[0], *(token + 1 for token in tokens[1:])])
        paths, following = verify([wrong], logits, temperature, device=device)
        assert (paths, following) == ([[0]], [tokens[1]])


def test_all_tokens_as_children_always_accept_one(device: str) -> None:
    """Of a law that is exhausted, nothing is left to rounding: 63 children are all there is."""
    fan = TokenTree([0, *range(63)], [-1] + [0] * 63)
    logits = hostile.normal(64 * 200, 63, seed=1, outliers=0.0)
    for q in (None, logits.softmax(-1)):
        paths, _ = verify([fan] * 200, logits, 1.0, device=device, draft_probs=q)
        assert all(len(path) == 2 for path in paths)


def test_a_law_that_rounding_leaves_nothing_of_is_taken_whole(device: str) -> None:
    """Beside 1, 1e-30 is lost: the target less the draft is 0 everywhere."""
    logits, q = torch.tensor([[5.0, -INF, -INF]] * 2), torch.tensor([[1.0, 1e-30, 0.0]] * 2)
    tree = TokenTree([0, 1], [-1, 0])
    assert verify([tree], logits, 1.0, device=device, draft_probs=q) == ([[0]], [0])


@pytest.mark.parametrize(
    "case",
    # Of the latter a GPU gives many trees a CTA each, and a single one a cluster of them.
    [CASE, TreeVerifyCase(80, 3, 40_000, 0.9, 30, 0.9), TreeVerifyCase(80, 3, 40_000, drawn=True)],
    ids=lambda case: case.id,
)
def test_what_a_request_says_does_not_depend_on_its_batch(
    case: TreeVerifyCase, device: str
) -> None:
    args, kwargs = case.make(device)
    first = tree_verify(*args, **kwargs)
    for result, again in zip(first, tree_verify(*args, **kwargs), strict=True):
        assert_equal(again, result)
    logits, *nodes, cu_nodes = args[:5]
    draft_probs = kwargs.get("draft_probs")
    for b in range(case.num_trees):
        rows = slice(int(cu_nodes[b]), int(cu_nodes[b + 1]))
        alone = tree_verify(
            logits[rows],
            *(t[rows] for t in nodes),
            cu_nodes[b : b + 2] - cu_nodes[b],
            *(t[b : b + 1] for t in args[5:]),
            None if draft_probs is None else draft_probs[rows],
            max_nodes=kwargs["max_nodes"],
        )
        for result, one in zip(first, alone, strict=True):
            assert_equal(one, result[b : b + 1])


def test_seed_and_position_each_change_the_numbers(device: str) -> None:
    logits = torch.zeros(256, 1000)
    trees = [TokenTree([0], [-1])] * 256
    _, tokens = verify(trees, logits, 1.0, device=device)
    assert len(set(tokens)) > 200
    args, kwargs = TreeVerifyCase(1, 1, 1000, dtype=torch.float32, ragged=False).make(device)
    args[0].zero_()
    seen = set()
    for position in (0, 1, 2**32, 2**33, 5):
        args[9].fill_(position)
        seen.add(tree_verify(*args, **kwargs)[2].item())
    assert len(seen) == 5


def test_every_kind_of_strides(device: str) -> None:
    args, kwargs = CASE.make(device)
    expected = tree_verify(*args, **kwargs)
    q = kwargs["draft_probs"]
    for name, tensor in hostile.odd_strides(args[0]):
        if tensor.stride(-1) == 1 and name != "expanded":
            for a, b in zip(tree_verify(tensor, *args[1:], **kwargs), expected, strict=True):
                assert_equal(a, b, name=name)
    for name, tensor in hostile.odd_strides(q):
        if tensor.stride(-1) == 1 and name != "expanded":
            results = tree_verify(*args, tensor, max_nodes=12)
            for a, b in zip(results, expected, strict=True):
                assert_equal(a, b, name=name)


def test_logits_beyond_32_bit_offsets(device: str) -> None:
    """Two rows that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((2, 8), (2**31, 1))
    far.copy_(torch.eye(8)[[3, 5]])
    assert verify([TokenTree([0, 3], [-1, 0])], far, device=device) == ([[0, 1]], [5])


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_with_other_trees() -> None:
    args, kwargs = CASE.make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tree_verify(*args, **kwargs)
    args[4].copy_(args[4].clamp(max=20))  # the trees behind row 20 are gone
    args[8].add_(1)
    graph.replay()
    for got, expected in zip(results, tree_verify(*args, **kwargs), strict=True):
        assert_equal(got, expected)


@pytest.mark.gpu
def test_hostile_trees_end_on_a_gpu() -> None:
    """What the CPU raises on: links back and out, tokens and parameters out of range."""
    args, kwargs = TreeVerifyCase(64, 12, 50, dtype=torch.float32, ragged=False).make("cpu")
    generator = torch.Generator().manual_seed(0)
    for index in (1, 2, 3, 4):
        args[index].random_(-20, 20, generator=generator)
    args[4].random_(-100, 2000, generator=generator)
    args[5][::3], args[5][1::3] = NAN, -1.0
    args[6].random_(-5, 100, generator=generator)
    args[7][::5], args[7][1::5] = NAN, -2.0
    cuda = [tensor.cuda() for tensor in args]
    accept_index, num_accepted, next_token = tree_verify(*cuda, **kwargs)
    assert ((num_accepted >= 0) & (num_accepted <= 12)).all()
    assert ((next_token >= 0) & (next_token < 50)).all()
    assert ((accept_index >= -1) & (accept_index < 12)).all()


@pytest.mark.gpu
def test_mixed_devices_are_a_named_error() -> None:
    args, kwargs = CASE.make("cuda")
    with pytest.raises(RuntimeError, match=r"tokens must be on cuda:0 as logits is, got cpu"):
        tree_verify(args[0], args[1].cpu(), *args[2:], **kwargs)


def arguments() -> dict[str, Any]:
    """Two trees of three nodes over five tokens, and a spare row."""
    return {
        "logits": torch.zeros(7, 5),
        "tokens": torch.tensor([-9, 1, 2, 99, 1, 2, 99]),
        "first_child": torch.tensor([1, -1, -1, 1, 2, -1, 99], dtype=torch.int32),
        "next_sibling": torch.tensor([-1, 2, -1, -1, -1, -1, 99], dtype=torch.int32),
        "cu_nodes": torch.tensor([0, 3, 6], dtype=torch.int32),
        "temperature": torch.ones(2),
        "top_k": torch.zeros(2, dtype=torch.int32),
        "top_p": torch.ones(2),
        "seed": torch.zeros(2, dtype=torch.int64),
        "position": torch.zeros(2, dtype=torch.int64),
        "draft_probs": torch.ones(7, 5),
        "max_nodes": 3,
    }


SHAPES = [
    ("logits", torch.zeros(7, 5, dtype=torch.int32), "must be float16, bfloat16 or float32, got"),
    ("logits", torch.zeros(7), r"must be \[T, V\] = \[\?, \?\], got \[7\]"),
    ("logits", torch.zeros(7, 0), r"must have 1 to 2\^31 - 1 columns, got 0"),
    ("logits", torch.zeros(5, 7).t(), "must have stride 1 in its last dimension"),
    ("tokens", torch.zeros(7, dtype=torch.int32), "must be int64, got int32"),
    ("tokens", torch.zeros(6, dtype=torch.int64), r"must be \[T\] = \[7\], got \[6\]"),
    ("first_child", torch.zeros(7, dtype=torch.int64), "must be int32, got int64"),
    ("next_sibling", torch.zeros(8, dtype=torch.int32), r"must be \[T\] = \[7\], got \[8\]"),
    ("cu_nodes", torch.zeros(2, dtype=torch.int32), r"must be \[B \+ 1\] = \[3\], got \[2\]"),
    ("temperature", torch.ones(2).double(), "must be float32, got another dtype"),
    ("top_k", torch.zeros(1, dtype=torch.int32), r"must be \[B\] = \[2\], got \[1\]"),
    ("top_p", torch.ones(2, 1), r"must be \[B\] = \[2\], got \[2, 1\]"),
    ("seed", torch.zeros(2, dtype=torch.int32), "must be int64, got int32"),
    ("position", torch.zeros(4, dtype=torch.int64)[::2], "must have stride 1"),
    ("draft_probs", torch.ones(7, 4), r"must be \[T, V\] = \[7, 5\], got \[7, 4\]"),
    ("draft_probs", torch.ones(7, 5).half(), "must be float32, got float16"),
    ("max_nodes", 0, r"must be in \[1, 1024\], got 0"),
    ("max_nodes", 1025, r"must be in \[1, 1024\], got 1025"),
]


@pytest.mark.parametrize(("name", "value", "message"), SHAPES)
def test_errors(name: str, value: Any, message: str, device: str) -> None:
    given = arguments() | {name: value}
    for key, like in given.items():
        if isinstance(like, Tensor):  # values do not matter, strides do
            given[key] = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=device
            )
    with pytest.raises(RuntimeError, match=f"effllm::tree_verify: {name} {message}"):
        tree_verify(**given)


VALUES = [
    ("cu_nodes", 0, -1, r"cu_nodes\[0\] must be at least 0, got -1"),
    ("cu_nodes", 1, 4, r"cu_nodes\[1\] must be in \[0, 3\], .*, got 4"),
    ("cu_nodes", 2, 2, r"cu_nodes\[2\] must be in \[3, 6\], .*, got 2"),
    ("cu_nodes", 2, 8, r"cu_nodes\[2\] must be in \[3, 6\], .*, got 8"),
    ("first_child", 4, 1, r"first_child\[4\] must be -1 or in \(1, 3\), .*, got 1"),
    ("first_child", 3, 3, r"first_child\[3\] must be -1 or in \(0, 3\), .*, got 3"),
    ("next_sibling", 1, 0, r"next_sibling\[1\] must be -1 or in \(1, 3\), .*, got 0"),
    ("next_sibling", 5, -2, r"next_sibling\[5\] must be -1 or in \(2, 3\), .*, got -2"),
    ("tokens", 1, 5, r"tokens\[1\] must be in \[0, 5\), got 5"),
    ("tokens", 5, -1, r"tokens\[5\] must be in \[0, 5\), got -1"),
    ("temperature", 1, -0.5, r"temperature\[1\] must be finite and at least 0, got -0.5"),
    ("temperature", 0, NAN, r"temperature\[0\] must be finite and at least 0, got nan"),
    ("temperature", 0, INF, r"temperature\[0\] must be finite and at least 0, got inf"),
    ("top_k", 1, -1, r"top_k\[1\] must be at least 0, got -1"),
    ("top_p", 0, 0.0, r"top_p\[0\] must be in \(0, 1\], got 0.0"),
    ("top_p", 1, 1.5, r"top_p\[1\] must be in \(0, 1\], got 1.5"),
    ("top_p", 1, NAN, r"top_p\[1\] must be in \(0, 1\], got nan"),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), VALUES)
def test_values_out_of_range(name: str, index: int, value: float, message: str) -> None:
    given = arguments()
    tree_verify(**given)
    given[name][index] = value
    with pytest.raises(RuntimeError, match=f"effllm::tree_verify: {message}"):
        tree_verify(**given)
