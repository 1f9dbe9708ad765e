"""effllm._host.TokenTree against plain Python constructions of the same trees, and bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm._host import TokenTree

Path = tuple[int, ...]


def check_arrays(tree: TokenTree, tokens: Sequence[int], parents: Sequence[int]) -> None:
    """Everything that a tree gives, by definition: from ancestors and lists of children."""
    nodes = range(len(tokens))
    ancestors = [[i] for i in nodes]
    for i in nodes[1:]:
        ancestors[i] += ancestors[parents[i]]
    children = [[j for j in nodes if parents[j] == i] for i in nodes]
    following = dict(pair for below in children for pair in itertools.pairwise(below))
    assert len(tree) == len(tokens)
    assert tree.tokens == list(tokens)
    assert tree.parents == list(parents)
    assert tree.depths == [len(ancestors[i]) - 1 for i in nodes]
    assert tree.first_child == [children[i][0] if children[i] else -1 for i in nodes]
    assert tree.next_sibling == [following.get(i, -1) for i in nodes]
    bits = torch.tensor(tree.mask_bits, dtype=torch.int64)
    seen = (bits[:, None] >> torch.arange(64)) & 1
    expected = torch.tensor([[int(j in ancestors[i]) for j in range(64)] for i in nodes])
    assert torch.equal(seen, expected)


def paths_of(tree: TokenTree) -> list[Path]:
    """The tokens below the root on the way to each node."""
    paths: list[Path] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 64) -> tuple[list[int], list[int]]:
    """Tokens and parents with distinct siblings; long chains and wide fans among them."""
    count = draw(st.integers(1, max_nodes))
    reach = draw(st.sampled_from([1, 3, max_nodes]))  # how far back a parent may be
    parents = [-1, *(draw(st.integers(max(0, i - reach), i - 1)) for i in range(1, count))]
    # Ranks among siblings, so that equal tokens occur below different parents.
    ranks = [parents[:i].count(parent) for i, parent in enumerate(parents)]
    names = draw(st.permutations(range(max_nodes)))
    return [names[rank] for rank in ranks], parents


@settings(deadline=None)
@given(tree=trees())
def test_any_tree(tree: tuple[list[int], list[int]]) -> None:
    check_arrays(TokenTree(*tree), *tree)


def test_one_node_and_the_largest_trees() -> None:
    check_arrays(TokenTree([5], [-1]), [5], [-1])
    check_arrays(TokenTree.chain([5]), [5], [-1])
    # Equal tokens along a chain are no siblings.
    check_arrays(TokenTree.chain([7] * 64), [7] * 64, list(range(-1, 63)))
    assert TokenTree.chain([7] * 64).mask_bits[63] == -1  # all 64 bits
    fan = list(range(100, 164))
    check_arrays(TokenTree(fan, [-1] + [0] * 63), fan, [-1] + [0] * 63)
    assert TokenTree(fan, [-1] + [0] * 63).mask_bits[63] == 1 - 2**63
    # Larger than 32 bits: tokens are int64.
    assert TokenTree([2**40, 2**40 + 1], [-1, 0]).tokens == [2**40, 2**40 + 1]


# The choices that Medusa's own model cards use for small batches look like these.
CHOICES = [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [0, 0, 1]]


@pytest.mark.parametrize("reverse", [False, True])
def test_choices(reverse: bool) -> None:
    candidates = [[10, 11, 12], [20, 21, 22], [10, 31]]
    tree = TokenTree.from_choices(9, CHOICES[::-1] if reverse else CHOICES, candidates)
    order = [[], [0], [1], [2], [0, 0], [0, 1], [0, 2], [1, 0], [0, 0, 0], [0, 0, 1]]
    parents = [-1] + [order.index(path[:-1]) for path in order[1:]]
    tokens = [9] + [candidates[len(path) - 1][path[-1]] for path in order[1:]]
    check_arrays(tree, tokens, parents)
    check_arrays(TokenTree.from_choices(9, [], []), [9], [-1])


Layers = list[list[tuple[int, float]]]

layers = st.lists(
    st.lists(
        # Few probabilities, so that ties and zeros occur.
        st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.5, 1.0])),
        max_size=4,
        unique_by=lambda candidate: candidate[0],
    ),
    max_size=3,
)


@settings(deadline=None)
@given(layers=layers, max_nodes=st.integers(1, 64))
def test_best_first_takes_the_likeliest_paths(layers: Layers, max_nodes: int) -> None:
    tree = TokenTree.best_first(
        7, [[t for t, _ in layer] for layer in layers], [[p for _, p in layer] for layer in layers],
        max_nodes,
    )  # fmt: skip
    check_arrays(tree, tree.tokens, tree.parents)
    prob = {
        tuple(token for token, _ in path): math.prod(p for _, p in path)
        for depth in range(len(layers) + 1)
        for path in itertools.product(*layers[:depth])
    }
    found = [prob[path] for path in paths_of(tree)]
    assert len(set(paths_of(tree))) == len(found)
    likeliest = sorted((p for p in prob.values() if p > 0), reverse=True)
    assert found == likeliest[:max_nodes]
    assert tree.tokens[0] == 7


def test_best_first_on_ties_takes_the_earlier() -> None:
    tree = TokenTree.best_first(7, [[1, 2], [3]], [[0.5, 0.5], [1.0]], 4)
    assert (tree.tokens, tree.parents) == ([7, 1, 2, 3], [-1, 0, 0, 1])


@settings(deadline=None)
@given(tree=trees(100), data=st.data(), max_nodes=st.integers(1, 64))
def test_most_likely_keeps_the_largest_products(
    tree: tuple[list[int], list[int]], data: st.DataObject, max_nodes: int
) -> None:
    tokens, parents = tree
    some_prob = st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])
    probs = data.draw(st.lists(some_prob, min_size=len(tokens), max_size=len(tokens)))
    product = [1.0]
    for i in range(1, len(tokens)):
        product.append(product[parents[i]] * probs[i])
    order = sorted(range(len(tokens)), key=lambda i: (i > 0, -product[i], i))
    kept = [i for i in order if product[i] > 0][:max_nodes]
    check_arrays(
        TokenTree.most_likely(tokens, parents, probs, max_nodes),
        [tokens[i] for i in kept],
        [-1] + [kept.index(parents[i]) for i in kept[1:]],
    )


def lookup(context: list[int], max_ngram: int, max_draft: int, max_nodes: int) -> list[Path]:
    """The drafts of prompt_lookup as paths, by comparing slices and growing the context."""
    paths: list[Path] = [()]
    for n in range(max_ngram, 0, -1):
        for end in range(len(context) - 1, n - 1, -1):
            longer = end > n and context[end - n - 1] == context[-n - 1 :][0]
            if context[end - n : end] != context[-n:] or (longer and n < max_ngram):
                continue
            text = list(context)
            for step in range(max_draft):
                text.append(text[end + step])
            draft = tuple(text[len(context) :])
            for path in (draft[:step] for step in range(1, max_draft + 1)):
                if path not in paths:
                    if len(paths) == max_nodes:
                        return paths
                    paths.append(path)
    return paths


@settings(deadline=None, max_examples=300)
@given(
    context=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    max_ngram=st.integers(1, 5),
    max_draft=st.integers(0, 6),
    max_nodes=st.integers(1, 12),
)
def test_prompt_lookup(context: list[int], max_ngram: int, max_draft: int, max_nodes: int) -> None:
    tree = TokenTree.prompt_lookup(context, max_ngram, max_draft, max_nodes)
    check_arrays(tree, tree.tokens, tree.parents)
    assert tree.tokens[0] == context[-1]
    assert paths_of(tree) == lookup(context, max_ngram, max_draft, max_nodes)


def test_prompt_lookup_one_by_one() -> None:
    def drafts(context: list[int], *args: int) -> list[Path]:
        return paths_of(TokenTree.prompt_lookup(context, *args))

    assert drafts([4], 3, 5) == [()]
    assert drafts([1, 2, 3], 3, 5) == [()]
    assert drafts([1, 2, 3, 1, 2], 2, 0) == [()]
    # The longer n-gram first, however old, then the most recent place; beginnings are shared.
    context = [1, 2, 7, 8, 5, 2, 7, 9, 5, 2, 6, 1, 2]
    chains = [(7,), (7, 8), (6,), (6, 1), (7, 9)]
    assert drafts(context, 2, 2) == [(), *chains]
    assert drafts(context, 2, 2, 4) == [(), *chains[:3]]
    assert drafts(context, 1, 1) == [(), (6,), (7,)]
    # Occurrences that overlap the end: drafts go on as the repetition does.
    assert drafts([3, 3], 3, 4)[-1] == (3, 3, 3, 3)
    assert drafts([9, 1, 2, 1, 2], 4, 5)[-1] == (1, 2, 1, 2, 1)
    # Places beyond the tree's 64 nodes are left out.
    many = [token for i in range(100) for token in (0, i + 1)] + [0]
    assert len(drafts(many, 1, 1)) == 64


BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (TokenTree, ([], []), "TokenTree: tokens must hold the root at least, got none"),
    (TokenTree, ([1, 2], [-1]), "TokenTree: parents must be as many as tokens, 2, got 1"),
    (TokenTree, ([1, 2], [0, 0]), r"TokenTree: parents\[0\] must be -1, .* got 0"),
    (TokenTree, ([1, 2, 3], [-1, 0, 2]), r"parents\[2\] must be in \[0, 2\), .* got 2"),
    (TokenTree, ([1, 2], [-1, -1]), r"parents\[1\] must be in \[0, 1\), .* got -1"),
    (TokenTree, ([1, -3], [-1, 0]), r"tokens\[1\] must not be negative, got -3"),
    (
        TokenTree,
        ([1, 5, 6, 5], [-1, 0, 0, 0]),
        r"tokens of siblings must differ: tokens\[1\] and tokens\[3\], both below node 0, are 5",
    ),
    (TokenTree, (range(65), range(-1, 64)), "tokens must be at most 64, .* got 65"),
    (TokenTree.chain, ([],), "TokenTree.chain: tokens must hold the root at least, got none"),
    (TokenTree.chain, ([0] * 65,), "TokenTree.chain: tokens must be at most 64, .* got 65"),
    (TokenTree.from_choices, (-1, [], []), "from_choices: root must not be negative, got -1"),
    (TokenTree.from_choices, (1, [[0], []], [[2]]), r"choices\[1\] must name a rank .* empty path"),
    (TokenTree.from_choices, (1, [[0, 0]], [[2]]), r"choices\[0\] .* long as candidates, 1, got 2"),
    (TokenTree.from_choices, (1, [[1]], [[2]]), r"choices\[0\] must end in a rank .*, 1\), got 1"),
    (TokenTree.from_choices, (1, [[-1]], [[2]]), r"choices\[0\] must end in a rank .* got -1"),
    (TokenTree.from_choices, (1, [[0], [0]], [[2]]), r"choices\[1\] must differ from other"),
    (
        TokenTree.from_choices,
        (1, [[0], [1, 0]], [[2, 3], [4]]),
        r"choices\[1\] must have the path before its last rank among choices, found none",
    ),
    (
        TokenTree.from_choices,
        (1, [[0], [1]], [[2, 2]]),
        "TokenTree.from_choices: tokens of siblings must differ: .* are 2",
    ),
    (TokenTree.from_choices, (1, [[i] for i in range(64)], [range(64)]), "at most 64, .* got 65"),
    (TokenTree.best_first, (-1, [], []), "best_first: root must not be negative, got -1"),
    (TokenTree.best_first, (1, [[2]], []), "probs must be as many lists as candidates, 1, got 0"),
    (TokenTree.best_first, (1, [[2]], [[]]), r"probs\[0\] must be as many as candidates\[0\], 1,"),
    (TokenTree.best_first, (1, [[2]], [[math.nan]]), r"probs\[0\]\[0\] must be in .* got nan"),
    (TokenTree.best_first, (1, [[2]], [[1.5]]), r"probs\[0\]\[0\] must be in \[0, 1\], got 1.5"),
    (TokenTree.best_first, (1, [[2, 2]], [[0.5, 0.5]]), "best_first: tokens of siblings must"),
    (TokenTree.best_first, (1, [], [], 0), r"max_nodes must be in \[1, 64\], got 0"),
    (TokenTree.best_first, (1, [], [], 65), r"max_nodes must be in \[1, 64\], got 65"),
    (TokenTree.most_likely, ([1, 2], [-1, 0], [1.0]), "probs must be as many as tokens, 2, got 1"),
    (TokenTree.most_likely, ([1, 2], [-1, 0], [1, -0.5]), r"probs\[1\] must be in .* got -0.5"),
    (TokenTree.most_likely, ([1, 2], [-1, 1], [1, 1]), r"most_likely: parents\[1\] must be in"),
    (TokenTree.prompt_lookup, ([], 2, 2), "prompt_lookup: context must hold a token"),
    (TokenTree.prompt_lookup, ([1], 0, 2), "max_ngram must be at least 1, got 0"),
    (TokenTree.prompt_lookup, ([1], 2, -1), "max_draft must not be negative, got -1"),
    (TokenTree.prompt_lookup, ([1], 2, 2, 65), r"max_nodes must be in \[1, 64\], got 65"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "args", "message"), BAD)
def test_errors(build: Callable[..., Any], args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*args)


def test_duplicates_that_are_left_out_are_no_error() -> None:
    """Below different parents equal tokens are different drafts."""
    tree = TokenTree.most_likely([1, 5, 5], [-1, 0, 0], [1.0, 0.5, 0.0])
    assert tree.tokens == [1, 5]
