"""PagedKVCache: bookkeeping checked by hand, contents checked against plain Python lists."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from filled_cache import HKV, LAYERS, D, contents, feed, make_cache, state, write

from effllm import ops
from effllm._host import TokenTree
from effllm.cache import OutOfPages, PagedKVCache, paged
from effllm.cache.batch import upload
from effllm.testing import hostile

# ---- the step ------------------------------------------------------------------------------------


def test_mixed_step_tensors(device: str) -> None:
    cache = make_cache(device)
    a, b = cache.add(), cache.add()
    cache.step([(a, 6)])
    batch = cache.step([(b, 3), (a, 1)])
    (b0,), (a0, a1) = cache.pages(b), cache.pages(a)
    assert batch.page_table.tolist() == [[b0, 0, 0, 0, 0], [a0, a1, 0, 0, 0]]
    assert batch.seq_lens.tolist() == [3, 7]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4]
    assert batch.max_seqlen_q == 3
    assert batch.slot_mapping.tolist() == [4 * b0, 4 * b0 + 1, 4 * b0 + 2, 4 * a1 + 2]
    assert batch.positions.tolist() == [0, 1, 2, 6]
    int32 = (batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    assert {t.dtype for t in int32} == {torch.int32}
    assert {t.dtype for t in (batch.slot_mapping, batch.positions)} == {torch.int64}
    assert {t.device.type for t in (*int32, batch.slot_mapping, batch.positions)} == {device}
    assert len({0, b0, a0, a1}) == 4


def test_table_and_lengths_stay_at_one_address() -> None:
    cache = make_cache()
    table, lens = cache.page_table.data_ptr(), cache.seq_lens.data_ptr()
    a, b = cache.add(), cache.add()
    for items in ([(a, 5)], [(b, 1), (a, 1)], [(a, 4)]):
        batch = cache.step(items)
        assert (batch.page_table.data_ptr(), batch.seq_lens.data_ptr()) == (table, lens)
    # The row of b, now shown by a alone, holds nothing of b.
    assert batch.page_table.tolist() == [[*cache.pages(a), 0, 0]]


FORK, ROOT = TokenTree([5, 6, 7, 8], [-1, 0, 0, 1]), TokenTree([9], [-1])


def test_a_step_of_trees(device: str) -> None:
    """Nodes have slots in their order, and positions by their depth."""
    cache = make_cache(device)
    a, b = cache.add(), cache.add()
    cache.step([(a, 6), (b, 2)])
    plain = cache.step([(a, 4), (b, 1)])
    batch = plain.with_trees([FORK, ROOT])
    assert batch.tree_mask is not None
    assert batch.tree_mask.tolist() == [1, 3, 5, 11, 1]
    assert batch.positions.tolist() == [6, 7, 7, 8, 2]
    assert {t.dtype for t in (batch.tree_mask, batch.positions)} == {torch.int64}
    assert batch.tree_mask.device == batch.positions.device == plain.positions.device
    assert replace(batch, tree_mask=None, positions=plain.positions) == plain


def test_padding_has_no_tree() -> None:
    cache = make_cache()
    plain = cache.step([(cache.add(), 4)], num_rows=2, num_tokens=6)
    batch = plain.with_trees([FORK])
    assert batch.tree_mask is not None
    assert batch.tree_mask.tolist() == [1, 3, 5, 11, -1, -1]
    assert batch.positions.tolist() == [0, 1, 1, 2, 0, 0]
    padding = cache.step([], num_rows=1, num_tokens=1).with_trees([])
    assert padding.tree_mask is not None
    assert padding.tree_mask.tolist() == [-1]


@pytest.mark.parametrize("trees", [[], [ROOT, ROOT], [FORK], [FORK, FORK], [FORK, ROOT, ROOT]])
def test_trees_of_another_step_are_named(trees: list[TokenTree]) -> None:
    cache = make_cache()
    batch = cache.step([(cache.add(), 4), (cache.add(), 1)])
    with pytest.raises(ValueError, match=r"with_trees: trees must have -?\d+ nodes, .* got \d+"):
        batch.with_trees(trees)


def test_padding_is_empty_and_writes_nothing(device: str) -> None:
    """Rows of different lengths are padded by rows without tokens and tokens without a row, which
    attention leaves at 0 and nothing is appended for."""
    cache = make_cache(device)
    a, b = cache.add(), cache.add()
    cache.step([(b, 3)])
    batch = cache.step([(a, 2), (b, 1)], num_rows=4, num_tokens=8)
    assert batch.page_table.shape == (4, 5)
    assert batch.page_table[2:].count_nonzero() == 0
    assert batch.seq_lens.tolist() == [2, 4, 0, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 2, 3, 3, 3]
    first, second = cache.pages(a)[0], cache.pages(b)[0]
    assert batch.slot_mapping.tolist() == [4 * first, 4 * first + 1, 4 * second + 3, *[-1] * 5]
    assert batch.positions.tolist() == [0, 1, 3, *[0] * 5]
    assert (batch.max_seqlen_q, batch.num_tokens) == (2, 3)
    assert {t.dtype for t in (batch.seq_lens, batch.cu_seqlens_q)} == {torch.int32}
    assert {t.dtype for t in (batch.slot_mapping, batch.positions)} == {torch.int64}
    only_padding = cache.step([], num_rows=2, num_tokens=2)
    assert only_padding.cu_seqlens_q.tolist() == [0, 0, 0]
    assert only_padding.slot_mapping.tolist() == [-1, -1]
    assert (only_padding.max_seqlen_q, only_padding.num_tokens) == (0, 0)


@pytest.mark.parametrize(("rows", "tokens"), [(3, 3), (3, 9), (4, 16)])
def test_attention_over_a_padded_step(device: str, rows: int, tokens: int) -> None:
    """Bits are those without padding; what memory held before does not matter."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    outs = []
    for padding in ({}, {"num_rows": rows, "num_tokens": tokens}):
        options: dict[str, Any] = {"max_batch": 4, "max_seq_len": 20, "page_size": 4}
        cache = PagedKVCache(1, 2, 16, dtype=dtype, device=device, **options)
        cache.k[0].fill_(math.nan)
        cache.v[0].fill_(math.nan)
        x = hostile.normal(16, 2, 16, dtype=dtype, device=device)
        items = [(cache.add(), 2), (cache.add(), 1)]
        batch = cache.step(items, **padding)
        k_cache, v_cache, *_ = cache.layer(0)
        q = x[: len(batch.positions)]
        ops.kv_append(q, q, k_cache, v_cache, batch.slot_mapping)
        out, lse = ops.paged_attention(
            q, k_cache, v_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q,
            max_seqlen_q=batch.max_seqlen_q,
        )  # fmt: skip
        outs.append(out[:3])
        assert out[3:].count_nonzero() == 0
        assert (lse[3:] == -math.inf).all()
        assert k_cache.isnan().sum() == (k_cache.numel() - 3 * 2 * 16)
    assert torch.equal(*outs)


def test_empty_step() -> None:
    batch = make_cache().step([])
    assert batch.page_table.shape == (0, 5)
    assert batch.cu_seqlens_q.tolist() == [0]
    assert batch.slot_mapping.shape == batch.positions.shape == (0,)
    assert batch.max_seqlen_q == 0


def test_tensors_are_usable_outside_the_inference_mode_that_built_them() -> None:
    with torch.inference_mode():
        cache = make_cache()
    feed(cache, cache.add(), [1.0, 2.0])
    assert not cache.k[0].is_inference()
    assert cache.k[0].shape == (21, 4, HKV, D)
    assert cache.k[0].transpose(1, 2).is_contiguous()


# ---- sequences -----------------------------------------------------------------------------------


def test_prefix_is_reused_up_to_the_last_token_and_per_salt() -> None:
    cache = make_cache()
    prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    first = cache.add(prompt, salt="x")
    assert cache.length(first) == 0
    feed(cache, first, [float(t) for t in prompt])
    cache.commit(first, prompt)
    # The second page holds the last token, which must be computed for its logits.
    again = cache.add(prompt, salt="x")
    assert cache.length(again) == 4
    assert cache.pages(again) == cache.pages(first)[:1]
    longer = cache.add([*prompt, 13], salt="x")
    assert cache.pages(longer) == cache.pages(first)
    assert cache.length(cache.add([*prompt, 13])) == 0
    assert cache.length(cache.add([5, 6, 7, 0, 9], salt="x")) == 0

    for seq in (first, again, longer):
        cache.free(seq)
    revived = cache.add([*prompt, 13], salt=b"x")
    assert contents(cache, revived) == [float(t) for t in prompt]


def test_prefix_chain_continues_over_commits() -> None:
    cache = make_cache()
    tokens = list(range(12))
    seq = cache.add(tokens[:3])
    for start, end in ((0, 3), (3, 7), (7, 8), (8, 12)):
        feed(cache, seq, [float(t) for t in tokens[start:end]])
        cache.commit(seq, tokens[:end])
    assert cache.length(cache.add([*tokens, 99])) == 12


def test_fork_copies_the_partial_page_only_when_written(device: str) -> None:
    cache = make_cache(device)
    a = cache.add()
    feed(cache, a, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    free = cache.pool.num_free
    b = cache.fork(a)
    assert cache.pages(b) == cache.pages(a)
    assert cache.pool.num_free == free
    write(cache, cache.step([(a, 1), (b, 1)]), torch.tensor([7.0, 8.0]))
    # One writer copies, the last one keeps the page.
    assert cache.pool.num_free == free - 1
    assert cache.pages(a)[0] == cache.pages(b)[0]
    assert cache.pages(a)[1] != cache.pages(b)[1]
    for layer in range(LAYERS):
        assert contents(cache, a, layer) == [1, 2, 3, 4, 5, 6, 7]
        assert contents(cache, b, layer) == [1, 2, 3, 4, 5, 6, 8]


def test_reorder_moves_contents_between_beams() -> None:
    cache = make_cache()
    beams = [cache.add() for _ in range(3)]
    for i, seq in enumerate(beams):
        feed(cache, seq, [10.0 * i, 10.0 * i + 1])
    cache.reorder(beams, [2, 0, 0])
    assert [contents(cache, seq) for seq in beams] == [[20, 21], [0, 1], [0, 1]]
    write(cache, cache.step([(seq, 1) for seq in beams]), torch.tensor([5.0, 6.0, 7.0]))
    assert [contents(cache, seq) for seq in beams] == [[20, 21, 5], [0, 1, 6], [0, 1, 7]]
    for seq in beams:
        cache.free(seq)
    assert cache.pool.num_free == cache.pool.num_pages - 1


def test_crop_takes_steps_back_and_frees_pages() -> None:
    cache = make_cache()
    seq = cache.add()
    feed(cache, seq, [float(i) for i in range(10)])
    free = cache.pool.num_free
    cache.crop(seq, 5)
    assert (cache.length(seq), cache.pool.num_free) == (5, free + 1)
    feed(cache, seq, [50.0])
    assert contents(cache, seq) == [0, 1, 2, 3, 4, 50]
    cache.crop(seq, 0)
    assert cache.pages(seq) == ()
    with pytest.raises(ValueError, match=r"crop: length must be in \[0, 0\], got 1"):
        cache.crop(seq, 1)


def test_crop_keeps_the_pages_that_nobody_else_sees() -> None:
    cache = make_cache()
    seq = cache.add()
    feed(cache, seq, [float(i) for i in range(10)])
    cache.reserve(seq, 6)
    pages, free = cache.pages(seq), cache.pool.num_free
    assert len(pages) == 4
    cache.crop(seq, 5, keep_pages=True)
    assert (cache.length(seq), cache.pages(seq), cache.pool.num_free) == (5, pages, free)
    feed(cache, seq, [50.0, 60.0, 70.0, 80.0])
    assert contents(cache, seq) == [0, 1, 2, 3, 4, 50, 60, 70, 80]
    # A committed page would be found with what is written next: it goes, and those behind it.
    cache.commit(seq, [0, 1, 2, 3, 4, 50, 60, 70, 80])
    cache.crop(seq, 3, keep_pages=True)
    assert cache.pages(seq) == pages[:1]
    feed(cache, seq, [33.0, 44.0])
    assert contents(cache, seq) == [0, 1, 2, 33, 44]
    other = cache.add([0, 1, 2, 3, 4, 50, 60, 70, 80])
    assert contents(cache, other) == [0, 1, 2, 3, 4, 50, 60, 70]
    # So does one that a fork holds.
    feed(cache, seq, [55.0, 66.0, 77.0, 88.0])
    cache.fork(seq)
    cache.crop(seq, 4, keep_pages=True)
    assert len(cache.pages(seq)) == 1


def test_accepted_nodes_move_to_the_front_of_their_step() -> None:
    cache = make_cache()
    a, b = cache.add(), cache.add()
    feed(cache, a, [1.0, 2.0, 3.0])
    batch = cache.step([(a, 6), (b, 3)])
    values = torch.tensor([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 20.0, 21.0, 22.0])
    write(cache, batch, values)
    paths = torch.tensor([[0, 2, 5, -1, -1, -1], [0, -1, -1, -1, -1, -1]], dtype=torch.int32)
    cache.move_path(batch, paths, torch.tensor([3, 1], dtype=torch.int32))
    cache.crop(a, 6)
    cache.crop(b, 1)
    assert contents(cache, a) == [1, 2, 3, 10, 12, 15]
    assert contents(cache, b) == [20]


def test_writing_after_a_crop_into_a_committed_page_leaves_the_prefix_intact() -> None:
    cache = make_cache()
    prompt = [1, 2, 3, 4, 5]
    seq = cache.add(prompt)
    feed(cache, seq, [1.0, 2.0, 3.0, 4.0, 5.0])
    cache.commit(seq, prompt)
    cache.crop(seq, 2)
    feed(cache, seq, [30.0, 40.0])
    cache.commit(seq, [1, 2, 30, 40])
    assert contents(cache, seq) == [1, 2, 30, 40]
    assert contents(cache, cache.add(prompt)) == [1, 2, 3, 4]
    assert contents(cache, cache.add([1, 2, 30, 40, 9])) == [1, 2, 30, 40]


def test_reserved_pages_are_used_first_and_never_shared() -> None:
    cache = make_cache(num_pages=5)
    a = cache.add()
    cache.reserve(a, 12)
    assert cache.pool.num_free == 1
    reserved = cache.pages(a)
    b = cache.fork(a)
    assert cache.pages(b) == ()
    cache.step([(b, 4)])
    for n in (4, 1, 7):
        cache.step([(a, n)])
    assert cache.pages(a) == reserved


def test_reset_forgets_sequences_and_prefixes() -> None:
    cache = make_cache()
    seq = cache.add([1, 2, 3, 4, 5])
    feed(cache, seq, [1.0, 2.0, 3.0, 4.0, 5.0])
    cache.commit(seq, [1, 2, 3, 4])
    cache.reset()
    assert cache.pool.num_free == cache.pool.num_pages - 1
    with pytest.raises(IndexError, match=f"no sequence {seq}"):
        cache.length(seq)
    fresh = cache.add([1, 2, 3, 4, 5])
    assert (fresh != seq, cache.length(fresh)) == (True, 0)
    batch = cache.step([(fresh, 5)])
    assert batch.page_table.tolist() == [[*cache.pages(fresh), 0, 0, 0]]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["block_copy", "upload"])
def test_a_step_that_runs_out_of_device_memory_changes_nothing(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    a = cache.add()
    feed(cache, a, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    b = cache.fork(a)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    before = state(cache)
    with monkeypatch.context() as patch:
        patch.setattr(ops if failing == "block_copy" else paged, failing, fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.step([(a, 1), (b, 1)])
    if failing == "block_copy":
        assert state(cache) == before
    assert (cache.length(a), cache.length(b)) == (6, 6)
    write(cache, cache.step([(a, 1), (b, 1)]), torch.tensor([7.0, 8.0]))
    assert contents(cache, a) == [1, 2, 3, 4, 5, 6, 7]
    assert contents(cache, b) == [1, 2, 3, 4, 5, 6, 8]


def test_out_of_pages_changes_nothing() -> None:
    cache = make_cache(num_pages=5)
    a = cache.add()
    feed(cache, a, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    b = cache.fork(a)
    cache.step([(cache.add(), 1)])
    before = state(cache)
    # a and b have one page to copy and two to append, and one page is left.
    with pytest.raises(OutOfPages, match="needed 3 pages, found 1 free"):
        cache.step([(a, 4), (b, 4)])
    with pytest.raises(OutOfPages, match="needed 2 pages, found 1 free"):
        cache.reserve(b, 4)
    assert state(cache) == before
    cache.step([(b, 2)])
    assert contents(cache, a) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("items", "num_rows", "error", "message"),
    [
        ([(0, 1), (0, 1)], None, ValueError, r"a sequence repeats in \[\(0, 1\), \(0, 1\)\]"),
        ([(0, 0)], None, ValueError, r"token counts must be at least 1, got \[0\]"),
        ([(0, 1)], 5, ValueError, r"rows must be in \[1, max_batch=4\], got 5"),
        ([(0, 1), (1, 1)], 1, ValueError, r"rows must be in \[2, max_batch=4\], got 1"),
        ([(i, 1) for i in range(5)], None, ValueError, r"rows must be in \[5, max_batch=4\]"),
        ([(1, 1), (0, 18)], None, ValueError, "sequence 0 has 3 tokens, cannot add 18: max_seq"),
        ([(1, 1), (9, 1)], None, IndexError, "no sequence 9"),
    ],
)
def test_bad_steps_change_nothing(
    items: list[tuple[int, int]], num_rows: int | None, error: type[Exception], message: str
) -> None:
    cache = make_cache()
    cache.step([(cache.add(), 3), (cache.add(), 1)])
    before = state(cache)
    with pytest.raises(error, match=message):
        cache.step(items, num_rows=num_rows)
    assert state(cache) == before
    with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
        cache.step([(0, 1), (1, 1)], num_rows=4, num_tokens=1)
    assert state(cache) == before


def test_other_errors_state_what_is_wrong() -> None:
    cache = make_cache()
    a, b = cache.add(), cache.add()
    cache.step([(a, 9)])
    with pytest.raises(ValueError, match="needs the 8 tokens of 2 full pages, got 7"):
        cache.commit(a, list(range(7)))
    for order in ([0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="as many indices below 2, got"):
            cache.reorder([a, b], order)
    with pytest.raises(ValueError, match="needs distinct sequences"):
        cache.reorder([a, a], [0, 0])
    with pytest.raises(ValueError, match="has 9 tokens, cannot add -1"):
        cache.reserve(a, -1)
    cache.free(b)
    for call in (cache.free, cache.fork, cache.length, cache.pages):
        with pytest.raises(IndexError, match=f"no sequence {b}"):
            call(b)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"page_size": 0}, r"page_size must be at least 1, got \(2, 2, 8, 4, 20, 0\)"),
        ({"max_batch": 0}, "must be at least 1"),
        ({"dtype": torch.int8}, "dtype must be bf16, fp16 or fp32, got torch.int8"),
        ({"num_pages": 1}, r"num_pages must be in \[2, .*\] \(page 0 is reserved\), got 1"),
    ],
)
def test_constructor_checks(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**sizes)


# ---- what a step sends ---------------------------------------------------------------------------


def test_upload_keeps_values_and_aligns_them(device: str) -> None:
    """Arrays of any dtype and size, empty ones and slices among them, share one allocation."""
    random = np.random.default_rng(0)
    arrays = [
        random.integers(-9, 9, 3).astype(np.int32),
        np.empty(0, np.int64),
        random.integers(-(2**62), 2**62, 5),
        random.random(1).astype(np.float32),
        random.random(7)[::2],
    ]
    tensors = upload(arrays, torch.device(device))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.device.type == device
        assert torch.equal(tensor.cpu(), torch.from_numpy(array.copy()))
    starts = [tensor.data_ptr() for tensor in tensors if len(tensor)]
    assert all(start % 16 == 0 for start in starts)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert upload([], torch.device(device)) == []
