"""Types of the compiled module effllm._host: host data structures, no torch."""

from collections.abc import Sequence

class OutOfPages(RuntimeError):
    """The pool holds too few free pages; nothing was changed."""

    found: int  # pages that were free
    needed: int  # pages that were asked for

class BlockPool:
    """Reference-counted pages of a paged KV cache, with prefix reuse.

    A page is held (reference count >= 1) or free. A held page that is full may be committed: it is
    then found by `match_prefix` through its tokens, its predecessors' tokens and a salt, and stays
    findable after its last release until `allocate` reuses it. Free pages are reused in this
    order: those never committed first, then committed ones, least recently released first.
    Page 0 is never handed out: it belongs to padding rows.

    Every verb is all or nothing: after an error the pool is as before. Errors: IndexError for a
    page outside the pool, ValueError for a page in the wrong state or a bad argument, OutOfPages.
    Not thread safe.
    """

    def __init__(self, num_pages: int, page_size: int, hash_bits: int = 64) -> None:
        """`num_pages` >= 2 pages of `page_size` >= 1 tokens each.

        `hash_bits` (0..64) truncates the page hash. Matches are always verified token by token, so
        it changes speed only; tests set it to force collisions.
        """

    @property
    def num_pages(self) -> int:
        """Pages in the pool, the reserved page 0 included."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out now, committed but unheld ones included."""

    @property
    def num_committed(self) -> int:
        """Pages that `match_prefix` can find, held or not."""

    def ref_count(self, page: int) -> int:
        """Number of holders; 0 for a free page and for page 0."""

    def is_committed(self, page: int) -> bool:
        """Whether the page is in the prefix index."""

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, each with reference count 1; OutOfPages if fewer are free."""

    def retain(self, pages: Sequence[int]) -> None:
        """One more holder for each page (a page listed twice gets two); all must be held."""

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page.

        Pass a sequence's pages in order: the later ones are then reused before the earlier ones,
        without which they could not be found.
        """

    def match_prefix(self, tokens: Sequence[int], salt: str | bytes = b"") -> list[int]:
        """Committed pages with the longest prefix of `tokens`, each retained for the caller."""

    def commit(
        self, page: int, tokens: Sequence[int], parent: int = 0, salt: str | bytes = b""
    ) -> None:
        """Makes a held, full page findable.

        `tokens`: the `page_size` tokens whose keys and values the page holds. `parent`: the
        committed page with the tokens just before (its content, not the page itself, becomes part
        of the key), 0 at the start of a sequence. `salt` separates what must not be shared:
        tenants, adapters. Committing the same content again is allowed, on this page or another.
        """

    def reset(self) -> None:
        """Frees every page and empties the prefix index."""
