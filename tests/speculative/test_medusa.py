"""MedusaHeads: values, trees, files, training, and the heads that ship with the demo model."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effllm import demo
from effllm.speculative import MedusaHeads, TokenTree
from effllm.speculative.train_medusa import accuracy, tokens_per_step, train

HIDDEN, VOCAB = 12, 20


def random_heads(
    num_heads: int = 3, num_layers: int = 2, tied: bool = False, seed: int = 0
) -> MedusaHeads:
    heads = MedusaHeads(HIDDEN, VOCAB, num_heads=num_heads, num_layers=num_layers, tied=tied)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return heads


def random_hidden(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
def test_values_are_those_of_the_definition(tied: bool) -> None:
    heads, hidden = random_heads(tied=tied).double(), random_hidden(2, 5).double()
    weights = heads.state_dict()
    lm_head = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    logits = heads(hidden, partial(F.linear, weight=lm_head))
    assert logits.shape == (3, 2, 5, VOCAB)
    for k in range(3):
        h = hidden
        for layer in range(2):
            z = h @ weights[f"{k}.{layer}.linear.weight"].T + weights[f"{k}.{layer}.linear.bias"]
            h = h + z / (1 + (-z).exp())
        last = lm_head if tied else weights[f"{k}.2.weight"]
        torch.testing.assert_close(logits[k], h @ last.T)


@pytest.mark.parametrize("tied", [False, True])
def test_new_heads_predict_what_the_model_does(tied: bool) -> None:
    weight, hidden = torch.randn(VOCAB, HIDDEN), random_hidden(4)
    heads = MedusaHeads(HIDDEN, VOCAB, num_heads=2, tied=tied, lm_head=weight)
    for logits in heads(hidden, partial(F.linear, weight=weight)):
        torch.testing.assert_close(logits, hidden @ weight.T)


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*found[parent], token) if parent >= 0 else (token,))
    return set(found)


@pytest.mark.parametrize("max_nodes", [1, 2, 9, 30])
def test_trees_are_the_likeliest(max_nodes: int) -> None:
    """Of all paths of candidates, those with the largest products."""
    heads, hidden = random_heads(), 0.1 * random_hidden(2)
    trees = heads.draft(hidden, [3, 4], max_nodes=max_nodes, candidates=4)
    best = heads(hidden).double().softmax(-1).topk(4)
    for row, (root, tree) in enumerate(zip((3, 4), trees, strict=True)):
        products = {
            (root, *(best.indices[d, row, i].item() for d, i in enumerate(ranks))): prod(
                best.values[d, row, i].item() for d, i in enumerate(ranks)
            )
            for depth in range(4)
            for ranks in product(range(4), repeat=depth)
        }
        wanted = sorted(products, key=lambda path: -products[path])[:max_nodes]
        assert paths(tree) == set(wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_keep_the_bits(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    heads = random_heads(tied=tied).to(dtype)
    heads.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, 2)
    loaded = MedusaHeads.from_pretrained(tmp_path)
    assert (len(loaded), loaded.num_layers, loaded.tied) == (3, 2, tied)
    assert (loaded.hidden_size, loaded.vocab_size) == (HIDDEN, VOCAB)
    assert loaded.state_dict().keys() == heads.state_dict().keys()
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == dtype
    converted = MedusaHeads.from_pretrained(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in converted.state_dict().values()} == {torch.float16}


def test_published_heads_are_read(tmp_path: Path) -> None:
    """The layout of medusa_lm_head.pt, written without our class."""
    weights = {}
    for head in range(2):
        weights[f"{head}.0.linear.weight"] = torch.randn(HIDDEN, HIDDEN)
        weights[f"{head}.0.linear.bias"] = torch.randn(HIDDEN)
        weights[f"{head}.1.weight"] = torch.randn(VOCAB, HIDDEN)
    torch.save(weights, tmp_path / "medusa_lm_head.pt")
    heads, hidden = MedusaHeads.from_pretrained(tmp_path), random_hidden(3)
    assert (len(heads), heads.num_layers) == (2, 1)
    z = hidden @ weights["1.0.linear.weight"].T + weights["1.0.linear.bias"]
    torch.testing.assert_close(
        heads(hidden)[1], (hidden + z * z.sigmoid()) @ weights["1.1.weight"].T
    )


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        MedusaHeads(4, 8, num_heads=0)
    with pytest.raises(ValueError, match=r"lm_head must be .* = \[8, 4\], got \[4, 8\]"):
        MedusaHeads(4, 8, lm_head=torch.zeros(4, 8))
    heads = random_heads()
    with pytest.raises(ValueError, match=r"roots B tokens, got \[2, 12\] and 1"):
        heads.draft(random_hidden(2), [1])
    with pytest.raises(ValueError, match=r"candidates must be in .* \[1, 20\], got 21"):
        heads.draft(random_hidden(1), [1], candidates=21)
    with pytest.raises(ValueError, match="max_nodes"):
        heads.draft(random_hidden(1), [1], max_nodes=65)
    with pytest.raises(ValueError, match="lm_head must be given, as the heads are tied to it"):
        random_heads(tied=True).draft(random_hidden(1), [1])
    with pytest.raises(FileNotFoundError, match="has neither medusa_lm_head"):
        MedusaHeads.from_pretrained(tmp_path)
    torch.save({"0.0.linear.weight": torch.zeros(2, 2)}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"must hold '<head>.<layer>.linear.weight'"):
        MedusaHeads.from_pretrained(tmp_path)


class Cycle(nn.Module):
    """A model that knows one permutation: each token is followed by ``order[token]``."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def model(self, ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.eye(len(self.order))[ids])

    def lm_head(self, hidden: Tensor) -> Tensor:
        return 20 * hidden[..., self.order.argsort()]

    def generate(self, prompts: Tensor, *, max_length: int, **_: object) -> Tensor:
        text = prompts
        while text.shape[1] < max_length:
            text = torch.cat([text, self.order[text[:, -1:]]], 1)
        return text


@pytest.mark.parametrize("tied", [False, True])
def test_heads_learn_what_comes_later(tied: bool) -> None:
    """Each head its own power of the permutation; every draft is then right."""
    torch.manual_seed(0)
    vocab = 16
    model = Cycle(torch.randperm(vocab).roll(1)[torch.randperm(vocab)])
    text = torch.randint(vocab, (1, 1))
    text = model.generate(text, max_length=200)[0]
    heads = MedusaHeads(vocab, vocab, num_heads=3, tied=tied)
    starts = text[:vocab, None]
    untrained = tokens_per_step(model, heads, starts, 20, max_nodes=4)
    curve = train(model, heads, text, steps=150, batch=2, length=32, learning_rate=3e-2)
    assert curve[-1]["losses"][2] < 0.1 < curve[0]["losses"][2]
    assert accuracy(model, heads, text[:128].view(4, 32)) == [1.0, 1.0, 1.0]
    assert untrained < 2
    assert tokens_per_step(model, heads, starts, 20, max_nodes=4) == 4.0


def test_shipped_heads_draft_for_the_demo_model() -> None:
    """On this Python's held-out text, near what the record says of the one they were judged on."""
    record = json.loads((demo.medusa_path() / "training_record.json").read_text())
    model, tokenizer = demo.load(dtype=torch.float32)
    heads = MedusaHeads.from_pretrained(demo.medusa_path(), dtype=torch.float32)
    windows = demo.held_out_tokens(tokenizer, limit=8192)
    for top in (1, 4):
        found = accuracy(model, heads, windows, top)
        assert found == pytest.approx(record[f"held_out_top{top}"], abs=0.05)
    rate = tokens_per_step(model, heads, windows[:, :64], 32, max_nodes=16)
    assert rate == pytest.approx(record["tokens_per_step_16_nodes"], rel=0.2)
    assert rate > 1.4
