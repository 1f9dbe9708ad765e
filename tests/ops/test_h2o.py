"""attn_colsum, h2o_append and h2o_attention together against H2O as the paper defines it, in plain
PyTorch with the whole matrix of attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from effllm.ops import attn_colsum, h2o_append, h2o_attention, kv_append, paged_attention

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 16
GROUP = HEADS // KV_HEADS


@dataclass
class SlowH2o:
    """One sequence. Nothing is ever thrown away: a token that goes is masked from then on."""

    budget: int
    recent: int
    n_sink: int
    num_tokens: int
    normalize: bool = False
    seen: int = 0
    smallest_gap: float = float("inf")
    """Between the scores of who went and who was next: how sure the choices are."""

    def __post_init__(self) -> None:
        count = self.num_tokens
        self.keys, self.values = torch.zeros(2, KV_HEADS, count, DIM, dtype=torch.float64)
        self.weights = torch.zeros(KV_HEADS, GROUP, count, count, dtype=torch.float64)
        self.kept = torch.zeros(KV_HEADS, count, dtype=torch.bool)
        self.scores = torch.zeros(KV_HEADS, count, dtype=torch.float64)
        self.token = torch.arange(count)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of a token: q [HQ, D], k and v [HKV, D]. Gives its output, [HQ, D]."""
        now, self.seen = self.seen, self.seen + 1
        self.keys[:, now], self.values[:, now] = k, v
        for head in range(KV_HEADS):
            if self.kept[head].sum() >= self.budget:
                self.kept[head, self.lowest(head, now)] = False
        self.kept[:, now] = True
        row = q.double().view(KV_HEADS, GROUP, DIM) @ self.keys.mT / DIM**0.5
        row = row.masked_fill(~self.kept[:, None], -torch.inf).softmax(-1)
        self.weights[:, :, now] = row
        self.scores += row.sum(1)
        return (row @ self.values).view(HEADS, DIM)

    def lowest(self, head: int, now: int) -> int:
        may_go = self.kept[head] & (self.token >= self.n_sink) & (self.token <= now - self.recent)
        scores = self.scores[head]
        if self.normalize:
            scores = scores / (now - self.token).clamp(min=1)
        two = scores.masked_fill(~may_go, torch.inf).topk(2, largest=False)
        gap = (two.values[1] - two.values[0]) / two.values[0]
        self.smallest_gap = min(self.smallest_gap, gap.item())
        return int(two.indices[0])


class FastH2o:
    """The same by the ops."""

    def __init__(self, slots: int, device: str, dtype: torch.dtype) -> None:
        pages = -(-slots // PAGE)
        shape = (KV_HEADS * pages, KV_HEADS, PAGE, DIM)
        self.caches = [
            torch.full(shape, float("nan"), dtype=dtype, device=device).transpose(1, 2)
            for _ in range(2)
        ]
        table = torch.randperm(KV_HEADS * pages, device=device).to(torch.int32)
        self.page_table = table.view(1, KV_HEADS, pages)
        self.scores = torch.full((1, KV_HEADS, slots), float("nan"), device=device)
        self.slot_pos = torch.full((1, KV_HEADS, slots), -1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(1, KV_HEADS, dtype=torch.int32, device=device)

    def fill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A whole prompt: q [n, HQ, D], k and v [n, HKV, D]."""
        num_tokens, device = len(q), q.device
        position = torch.arange(num_tokens, device=device)
        for head in range(KV_HEADS):
            pages = self.page_table[0, head, position // PAGE].long()
            for rows, cache in zip((k, v), self.caches, strict=True):
                cache[pages, position % PAGE, head] = rows[:, head]
        self.seq_lens.fill_(num_tokens)
        self.slot_pos[..., :num_tokens] = position
        starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        tables = (self.page_table, self.seq_lens, starts)
        out, lse = paged_attention(q, *self.caches, *tables, max_seqlen_q=num_tokens)
        sums = attn_colsum(q, self.caches[0], *tables, lse, max_seqlen_k=num_tokens)
        self.scores[..., :num_tokens] = sums
        return out

    def step(self, position: int, q: Tensor, k: Tensor, v: Tensor, **options: int) -> Tensor:
        state = (self.scores, self.slot_pos, self.seq_lens, self.page_table)
        positions = torch.tensor([position], device=q.device)
        h2o_append(k[None], v[None], *self.caches, *state, positions, **options)
        tables = (self.scores, self.page_table, self.seq_lens)
        return h2o_attention(q[None], *self.caches, *tables)[0][0]

    def kept(self, head: int) -> set[int]:
        return set(self.slot_pos[0, head, : int(self.seq_lens[0, head])].tolist())


def tokens(count: int, device: str) -> tuple[torch.dtype, list[Tensor]]:
    """q, k and v of a text in which some tokens are heavy hitters, others in each KV head; in fp32,
    on a GPU in fp16."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(count, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    heavy = torch.rand(count, KV_HEADS, 1, generator=generator) < 0.02
    direction = torch.randn(DIM, generator=generator)
    q = q + direction / 2
    k = torch.where(heavy, k + direction, k)
    return dtype, [rows.to(device, dtype) for rows in (q, k, v)]


@pytest.mark.parametrize("normalize", [False, True])
def test_2000_tokens_keep_what_the_dense_matrix_keeps(normalize: bool, device: str) -> None:
    """After a prompt of 40: the same positions in each head at each step, and the same outputs."""
    count, prompt, budget, recent, n_sink = 2040, 40, 96, 16, 4
    dtype, (q, k, v) = tokens(count, device)
    slow = SlowH2o(budget, recent, n_sink, count, normalize)
    fast = FastH2o(budget, device, dtype)
    options = {"budget": budget, "recent": recent, "n_sink": n_sink, "normalize": normalize}
    tolerance = {"rtol": 1e-3, "atol": 2e-3 if device == "cuda" else 1e-5}

    out = fast.fill(q[:prompt], k[:prompt], v[:prompt])
    for position in range(count):
        expected = slow.step(q[position].cpu(), k[position].cpu(), v[position].cpu())
        if position < prompt:
            actual = out[position]
        else:
            actual = fast.step(position, q[position], k[position], v[position], **options)
            for head, wanted in enumerate(slow.kept):
                expected_set = set(wanted.nonzero().flatten().tolist())
                assert fast.kept(head) == expected_set, f"head {head} after token {position}"
        torch.testing.assert_close(actual.double().cpu(), expected, **tolerance)
    assert slow.smallest_gap > 3e-5, "choices that rounding decides show nothing"

    # The scores are the column sums of the matrix, and heads went their own ways.
    for head in range(KV_HEADS):
        sums = slow.weights[head].sum((0, 1))
        slots = fast.slot_pos[0, head].cpu().long()
        torch.testing.assert_close(
            fast.scores[0, head].cpu().double(), sums[slots], rtol=1e-4, atol=1e-5
        )
    only_here = fast.kept(0) - fast.kept(1)
    assert len(only_here) > 10


def test_a_budget_as_long_as_the_text_is_the_full_cache(device: str) -> None:
    """To the bit on the CPU; a GPU may cut keys elsewhere."""
    count = 150
    dtype, (q, k, v) = tokens(count, device)
    fast = FastH2o(count, device, dtype)
    pages = -(-count // PAGE)
    full = [
        torch.zeros(pages, KV_HEADS, PAGE, DIM, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(2)
    ]
    table = torch.arange(pages, dtype=torch.int32, device=device)[None]
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    for position in range(count):
        row = slice(position, position + 1)
        actual = fast.step(position, q[position], k[position], v[position], recent=1)
        kv_append(k[row], v[row], *full, torch.tensor([position], device=device))
        seq_lens = torch.tensor([position + 1], dtype=torch.int32, device=device)
        expected, _ = paged_attention(q[row], *full, table, seq_lens, starts, max_seqlen_q=1)
        if device == "cpu":
            assert torch.equal(actual, expected[0])
        else:
            torch.testing.assert_close(actual, expected[0], rtol=2e-3, atol=2e-3)
    assert fast.slot_pos.flatten(0, 1).tolist() == [list(range(count))] * KV_HEADS
