"""effllm._host: the page pool against a plain Python model, and its edge cases one by one."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from effllm._host import BlockPool, OutOfPages


class PoolMachine(RuleBasedStateMachine):
    """Random verbs, valid and invalid, on a small pool.

    The model is exact about counts and about the order in which cached pages are reused. An error
    must leave the pool as it was, which the invariant and all later verbs check.
    """

    @initialize(
        num_pages=st.integers(2, 10), size=st.integers(1, 3), bits=st.sampled_from([0, 1, 64])
    )
    def start(self, num_pages: int, size: int, bits: int) -> None:
        self.pool = BlockPool(num_pages, size, hash_bits=bits)
        self.size = size
        self.clear()

    def clear(self) -> None:
        self.refs: Counter[int] = Counter()
        self.plain = set(range(1, self.pool.num_pages))  # free, not committed
        self.cached: deque[int] = deque()  # free and committed, next to be reused first
        # Committed pages: the tokens of the whole chain, the salt, and the identity of the content.
        self.chain: dict[int, tuple[int, ...]] = {}
        self.salt: dict[int, bytes] = {}
        self.parent: dict[int, object] = {}
        self.content: dict[int, object] = {}

    pages = st.lists(st.integers(0, 9), max_size=5)
    salts = st.sampled_from([b"", b"tenant"])
    any_page = st.integers(-1, 10)

    def tokens(self, data: st.DataObject, max_pages: int = 4) -> list[int]:
        # Two letters, so that prefixes meet often.
        return data.draw(st.lists(st.integers(0, 1), max_size=max_pages * self.size))

    def held(self, page: int) -> bool:
        return self.refs[page] > 0

    def bad_page(self, page: int) -> type[Exception] | None:
        if not 0 <= page < self.pool.num_pages:
            return IndexError
        return None if self.held(page) else ValueError

    @rule(count=st.integers(-1, 10))
    def allocate(self, count: int) -> None:
        self.check_allocate(count)

    def check_allocate(self, count: int) -> list[int]:
        free = len(self.plain) + len(self.cached)
        if count < 0:
            with pytest.raises(ValueError, match=f"must not be negative, got {count}"):
                self.pool.allocate(count)
        elif count > free:
            with pytest.raises(OutOfPages) as error:
                self.pool.allocate(count)
            assert (error.value.found, error.value.needed) == (free, count)
        else:
            pages = self.pool.allocate(count)
            for page in pages:
                assert not self.held(page), "a held page was handed out"
                if self.plain:
                    self.plain.remove(page)
                else:
                    assert page == self.cached.popleft(), "not the least recently released"
                    for table in (self.chain, self.salt, self.parent, self.content):
                        del table[page]
                self.refs[page] = 1
            return pages
        return []

    @rule(data=st.data(), salt=salts, reuse=st.booleans())
    def run_sequence(self, data: st.DataObject, salt: bytes, reuse: bool) -> None:
        """What a cache does for one prompt: reuse a prefix, allocate the rest, commit it.

        Without the reuse, equal content ends up on several pages.
        """
        tokens = self.tokens(data)
        full = len(tokens) // self.size
        chain = self.check_match(tokens, salt) if reuse else []
        rest = full - len(chain)
        if rest > self.pool.num_free:
            return
        chain += self.check_allocate(rest)
        for i in range(full - rest, full):
            page_tokens = tokens[i * self.size : (i + 1) * self.size]
            self.check_commit(chain[i], page_tokens, chain[i - 1] if i else 0, salt)

    @rule(pages=pages)
    def retain(self, pages: list[int]) -> None:
        errors = [e for page in pages if (e := self.bad_page(page))]
        if errors:
            with pytest.raises(errors[0], match=r"BlockPool.retain: page \d+ is"):
                self.pool.retain(pages)
        else:
            self.pool.retain(pages)
            self.refs.update(pages)

    @rule(data=st.data(), pages=pages, mostly_valid=st.booleans())
    def release(self, data: st.DataObject, pages: list[int], mostly_valid: bool) -> None:
        if mostly_valid and any(self.refs.values()):
            pages = data.draw(st.permutations(sorted(self.refs.elements())))
            pages = list(pages[: data.draw(st.integers(0, len(pages)))])
        if any(self.bad_page(page) for page in pages) or Counter(pages) - self.refs:
            with pytest.raises((ValueError, IndexError), match=r"BlockPool.release: page \d+ is"):
                self.pool.release(pages)
            return
        self.pool.release(pages)
        self.refs.subtract(pages)
        for page in dict.fromkeys(reversed(pages)):
            if self.held(page):
                continue
            if page in self.content:
                self.cached.append(page)
            else:
                self.plain.add(page)

    @rule(data=st.data(), salt=salts)
    def match_prefix(self, data: st.DataObject, salt: bytes) -> None:
        self.check_match(self.tokens(data), salt)

    def check_match(self, tokens: list[int], salt: bytes) -> list[int]:
        found = self.pool.match_prefix(tokens, salt)
        parent: object = None
        for i in range(len(tokens) // self.size):
            chain = tuple(tokens[: (i + 1) * self.size])
            candidates = [
                page
                for page in self.content
                if self.parent[page] is parent
                and self.chain[page][-self.size :] == chain[-self.size :]
                and self.salt[page] == salt
            ]
            assert (i < len(found)) == bool(candidates)
            if not candidates:
                break
            page = found[i]
            assert page in candidates
            assert (self.chain[page], self.salt[page]) == (chain, salt), "a false hit"
            assert self.held(page) or not any(map(self.held, candidates)), "a held one is free"
            parent = self.content[page]
            if not self.held(page):
                self.cached.remove(page)
            self.refs[page] += 1
        return found

    @rule(data=st.data(), page=any_page, parent=any_page, salt=salts, mostly_valid=st.booleans())
    def commit(
        self, data: st.DataObject, page: int, parent: int, salt: bytes, mostly_valid: bool
    ) -> None:
        live = sorted(p for p in self.refs if self.held(p))
        tokens = self.tokens(data)
        if mostly_valid and live:
            page = data.draw(st.sampled_from(live))
            parent = data.draw(st.sampled_from([0, *(p for p in live if p in self.content)]))
            tokens = (tokens * self.size + [0] * self.size)[: self.size]
        self.check_commit(page, tokens, parent, salt)

    def check_commit(self, page: int, tokens: list[int], parent: int, salt: bytes) -> None:
        known_parent = self.content.get(parent)
        error = self.bad_page(page)
        if not error and len(tokens) != self.size:
            error = ValueError
        if not error and parent != 0:
            error = self.bad_page(parent) or (None if known_parent else ValueError)
        if not error and page in self.content:
            same = (
                self.parent[page] is known_parent
                and list(self.chain[page][-self.size :]) == tokens
                and self.salt[page] == salt
            )
            error = None if same else ValueError
        if error:
            with pytest.raises(error, match=r"BlockPool.commit: page -?\d+"):
                self.pool.commit(page, tokens, parent, salt)
            return
        self.pool.commit(page, tokens, parent, salt)
        if page in self.content:
            return
        twins = [
            self.content[other]
            for other in self.content
            if self.parent[other] is known_parent
            and list(self.chain[other][-self.size :]) == tokens
            and self.salt[other] == salt
        ]
        self.parent[page] = known_parent
        self.content[page] = twins[0] if twins else object()
        self.chain[page] = self.chain.get(parent, ()) + tuple(tokens)
        self.salt[page] = salt

    @rule()
    def reset(self) -> None:
        self.pool.reset()
        self.clear()

    @invariant()
    def same_state(self) -> None:
        assert self.pool.num_free == len(self.plain) + len(self.cached)
        assert self.pool.num_committed == len(self.content)
        for page in range(self.pool.num_pages):
            assert self.pool.ref_count(page) == self.refs[page]
            assert self.pool.is_committed(page) == (page in self.content)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def committed_chain(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Allocates and commits the full pages of `tokens`; they stay held."""
    size = pool.page_size
    pages = pool.allocate(len(tokens) // size)
    for i, page in enumerate(pages):
        pool.commit(page, tokens[i * size : (i + 1) * size], pages[i - 1] if i else 0, salt)
    return pages


def test_page_zero_is_never_handed_out() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    for verb in (pool.retain, pool.release):
        with pytest.raises(ValueError, match="page 0 is reserved"):
            verb([0])
    with pytest.raises(ValueError, match="page 0 is reserved"):
        pool.commit(0, [1, 2, 3, 4])


def test_exhaustion_names_both_numbers_and_takes_nothing() -> None:
    pool = BlockPool(4, 1)
    pool.allocate(2)
    with pytest.raises(OutOfPages, match="needed 2 pages, found 1 free") as error:
        pool.allocate(2)
    assert (error.value.found, error.value.needed) == (1, 2)
    assert isinstance(error.value, RuntimeError)
    assert pool.num_free == 1
    assert len(pool.allocate(1)) == 1


@pytest.mark.parametrize("hash_bits", [0, 64])
def test_no_false_hit_when_hashes_collide(hash_bits: int) -> None:
    # With 0 bits every page has the same hash, so only the comparison of tokens can tell.
    pool = BlockPool(8, 2, hash_bits=hash_bits)
    pages = committed_chain(pool, [1, 2, 3, 4])
    assert pool.match_prefix([1, 2, 3, 4, 5]) == pages
    assert pool.match_prefix([1, 2, 3, 5]) == pages[:1]
    assert pool.match_prefix([2, 1]) == []
    assert pool.match_prefix([3, 4]) == []  # the same page after another prefix
    assert pool.match_prefix([1, 2], b"other tenant") == []
    assert pool.match_prefix([1]) == []


def test_salt_separates_and_text_equals_its_bytes() -> None:
    pool = BlockPool(8, 2)
    ours = committed_chain(pool, [1, 2], b"a")
    theirs = committed_chain(pool, [1, 2], b"b")
    assert pool.match_prefix([1, 2], "a") == ours
    assert pool.match_prefix([1, 2], "b") == theirs


def test_released_chain_is_reused_from_its_end() -> None:
    pool = BlockPool(5, 1)
    first = committed_chain(pool, [1, 2])
    second = committed_chain(pool, [7, 8])
    pool.release(first)
    pool.release(second)
    assert pool.num_free == 4
    assert pool.allocate(1) == [first[1]]  # the oldest, and its end before its start
    assert pool.match_prefix([1, 2]) == [first[0]]  # held again, so the next victim is `second`
    assert pool.allocate(1) == [second[1]]
    assert pool.num_committed == 2


def test_uncommitted_pages_are_reused_before_cached_ones() -> None:
    pool = BlockPool(4, 1)
    cached = committed_chain(pool, [5])
    plain = pool.allocate(2)
    pool.release(cached)
    pool.release(plain)
    assert sorted(pool.allocate(2)) == sorted(plain)
    assert pool.match_prefix([5]) == cached


def test_child_does_not_match_below_a_page_that_took_its_parents_place() -> None:
    pool = BlockPool(4, 1)
    parent, child = committed_chain(pool, [1, 2])
    pool.release([parent])
    pool.allocate(1)
    (reused,) = pool.allocate(1)
    assert reused == parent
    pool.commit(reused, [9])
    assert pool.match_prefix([9, 2]) == [parent]  # not the child, which continues [1]
    pool.release([child])


def test_equal_content_on_two_pages_keeps_the_chain_alive() -> None:
    pool = BlockPool(6, 1)
    first = committed_chain(pool, [1])
    second = committed_chain(pool, [1, 2])  # computed before `first` could be matched
    pool.retain(first)
    assert pool.match_prefix([1, 2]) == [first[0], second[1]]  # the child continues either
    pool.release(first * 3)  # 1 + 1 retained + 1 matched
    assert pool.match_prefix([1, 2]) == second  # the held twin, not the free one
    assert pool.ref_count(first[0]) == 0
    pool.allocate(3)
    assert pool.num_committed == 2  # the twin was reused
    assert pool.match_prefix([1, 2]) == second


def test_release_counts_repeats_and_is_all_or_nothing() -> None:
    pool = BlockPool(4, 1)
    a, b = pool.allocate(2)
    pool.retain([a])
    with pytest.raises(ValueError, match=f"BlockPool.release: page {b} is not held"):
        pool.release([a, a, b, b])
    assert (pool.ref_count(a), pool.ref_count(b)) == (2, 1)
    with pytest.raises(IndexError, match=r"page 4 is outside \[0, 4\)"):
        pool.release([a, 4])
    pool.release([a, b, a])
    assert pool.num_free == 3


def test_commit_states_what_is_wrong() -> None:
    pool = BlockPool(6, 2)
    a, b = pool.allocate(2)
    with pytest.raises(ValueError, match=f"page {a} holds 2 tokens, got 3"):
        pool.commit(a, [1, 2, 3])
    with pytest.raises(ValueError, match=f"page {a}, the parent, is not committed"):
        pool.commit(b, [1, 2], parent=a)
    with pytest.raises(ValueError, match="page 5 is not held"):
        pool.commit(5, [1, 2])
    pool.commit(a, [1, 2])
    pool.commit(a, [1, 2])
    with pytest.raises(ValueError, match=f"page {a} is committed with other content"):
        pool.commit(a, [1, 3])
    assert pool.num_committed == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 16), r"num_pages must be in \[2, 2147483647\] \(page 0 is reserved\), got 1"),
        ((2**31, 16), "got 2147483648"),
        ((4, 0), "page_size must be at least 1, got 0"),
        ((4, 16, 65), r"hash_bits must be in \[0, 64\], got 65"),
        ((4, 16, -1), r"hash_bits must be in \[0, 64\], got -1"),
    ],
)
def test_constructor_checks(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockPool(*arguments)


def test_huge_and_negative_tokens_are_values_like_any_other() -> None:
    pool = BlockPool(4, 2)
    pages = committed_chain(pool, [-1, 2**63 - 1])
    assert pool.match_prefix([-1, 2**63 - 1]) == pages
    with pytest.raises(TypeError):
        pool.match_prefix([2**63, 0])
