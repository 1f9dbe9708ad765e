"""PagedKVCache against references: a random life, and attention over many steps."""

from __future__ import annotations

import torch
from filled_cache import HKV, D, contents, make_cache, state, write
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from effllm import ops
from effllm.cache import OutOfPages


class CacheMachine(RuleBasedStateMachine):
    """Random life of a small cache: every sequence must always read back what it was fed.

    The stored value of a token is a number given to its whole prefix, as a model's keys depend on
    the whole prefix; so a wrongly shared or overwritten page shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(num_pages=10, page_size=2, max_seq_len=9, max_batch=4)
        self.tokens: dict[int, list[int]] = {}
        self.swapped: dict[int, list[int]] = {}
        self.numbers: dict[tuple[int, ...], float] = {}

    token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=6)
    some = precondition(lambda self: len(self.tokens) > 0)
    room = precondition(lambda self: len(self.tokens) + len(self.swapped) < 5)

    def values(self, tokens: list[int], start: int) -> list[float]:
        prefixes = [tuple(tokens[: i + 1]) for i in range(start, len(tokens))]
        return [self.numbers.setdefault(p, float(len(self.numbers))) for p in prefixes]

    def pick(self, data: st.DataObject) -> int:
        return int(data.draw(st.sampled_from(sorted(self.tokens))))

    def check(self) -> None:
        for seq, tokens in self.tokens.items():
            assert contents(self.cache, seq) == self.values(tokens, 0)
        for seq, tokens in self.swapped.items():
            assert self.cache.is_swapped_out(seq)
            assert self.cache.length(seq) == len(tokens)
        held = {page for seq in self.tokens for page in self.cache.pages(seq)}
        assert 0 not in held
        pool = self.cache.pool
        assert pool.num_free == pool.num_pages - 1 - len(held)

    @room
    @rule(tokens=token_lists)
    def add(self, tokens: list[int]) -> None:
        seq = self.cache.add(tokens)
        self.tokens[seq] = tokens[: self.cache.length(seq)]
        assert len(self.tokens[seq]) < len(tokens)
        self.check()
        self.step_all({seq: tokens[len(self.tokens[seq]) :]})

    @some
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), max_size=4, unique=True))
        self.step_all({seq: data.draw(self.token_lists.map(lambda t: t[:3])) for seq in seqs})

    def step_all(self, new: dict[int, list[int]]) -> None:
        before = state(self.cache)
        items = [(seq, len(tokens)) for seq, tokens in new.items()]
        try:
            batch = self.cache.step(items)
        except (OutOfPages, ValueError):  # the pool or max_seq_len
            assert state(self.cache) == before
            return
        values: list[float] = []
        for seq, tokens in new.items():
            start = len(self.tokens[seq])
            self.tokens[seq] = self.tokens[seq] + tokens
            values += self.values(self.tokens[seq], start)
        write(self.cache, batch, torch.tensor(values))
        self.check()

    @some
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.cache.commit(seq, self.tokens[seq])

    @some
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        length = data.draw(st.integers(0, len(self.tokens[seq])))
        self.cache.crop(seq, length)
        self.tokens[seq] = self.tokens[seq][:length]
        self.check()

    @some
    @room
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.tokens[self.cache.fork(seq)] = self.tokens[seq]
        self.check()

    @some
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        seqs = sorted(self.tokens)
        source = [data.draw(st.integers(0, len(seqs) - 1)) for _ in seqs]
        self.cache.reorder(seqs, source)
        self.tokens = {seq: self.tokens[seqs[i]] for seq, i in zip(seqs, source, strict=True)}
        self.check()

    @some
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.cache.free(seq)
        del self.tokens[seq]
        self.check()

    @some
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.cache.swap_out(seq)
        if self.tokens[seq]:
            self.swapped[seq] = self.tokens.pop(seq)
        self.check()

    @precondition(lambda self: len(self.swapped) > 0)
    @rule(data=st.data(), discard=st.booleans())
    def swap_in(self, data: st.DataObject, discard: bool) -> None:
        seq = int(data.draw(st.sampled_from(sorted(self.swapped))))
        if discard:
            self.cache.free(seq)
            del self.swapped[seq]
            return
        before = state(self.cache)
        try:
            self.cache.swap_in(seq)
        except OutOfPages:
            assert state(self.cache) == before
            return
        self.tokens[seq] = self.swapped.pop(seq)
        self.check()


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_attention_over_steps_equals_one_dense_pass(device: str, nan_memory: None) -> None:
    """Chunked prefill, decode, a fork and a prefix hit, with NaN in every slot never written."""
    torch.manual_seed(1)
    dtype = torch.float32 if device == "cpu" else torch.float16
    cache = make_cache(device, dtype=dtype, max_seq_len=32)
    q, k, v = (torch.randn(2, 14, heads, D, dtype=dtype, device=device) for heads in (4, HKV, HKV))
    # Two sequences that agree in their first ten tokens.
    for t in (q, k, v):
        t[1, :10] = t[0, :10]
    group = 4 // HKV
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double().transpose(1, 2),
        k.double().transpose(1, 2).repeat_interleave(group, 1),
        v.double().transpose(1, 2).repeat_interleave(group, 1),
        is_causal=True,
    ).transpose(1, 2)

    def run(items: list[tuple[int, int, int]]) -> None:
        """Feeds (sequence, row of the data, tokens) and compares the outputs of these tokens."""
        starts = [cache.length(seq) for seq, _, _ in items]
        batch = cache.step([(seq, n) for seq, _, n in items])

        def new(t: Tensor) -> Tensor:
            return torch.cat(
                [t[row, s : s + n] for (_, row, n), s in zip(items, starts, strict=True)]
            )

        ops.kv_append(new(k), new(v), cache.k[1], cache.v[1], batch.slot_mapping)
        out, _ = ops.paged_attention(
            new(q),
            cache.k[1],
            cache.v[1],
            batch.page_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
            max_seqlen_q=batch.max_seqlen_q,
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(out.double(), new(dense), atol=tolerance, rtol=tolerance)

    tokens = list(range(14))
    a = cache.add(tokens)
    run([(a, 0, 7)])
    run([(a, 0, 3)])
    cache.commit(a, tokens[:10])
    b = cache.fork(a)
    run([(b, 1, 2), (a, 0, 1)])
    run([(a, 0, 3), (b, 1, 2)])
    c = cache.add(tokens)
    assert cache.length(c) == 8
    run([(c, 0, 6)])
