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

class TokenTree:
    """Draft tokens that the target model sees in one pass, as a tree; it never changes.

    Node 0, the root, is the last token that is certain. Below a node stand tokens that may follow
    it; siblings are distinct and are tried in node order, and parents come before their children.
    A tree has 1 to 64 nodes, as many as a mask word has bits. Errors: ValueError that names the
    argument, with what was found and needed; a tree of more than 64 nodes is one.

    The arrays, one entry per node, are lists as `torch.tensor` takes them: int64 `tokens` and
    `mask_bits`, int32 the others.
    """

    def __init__(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        """Any tree: `parents[0]` is -1, others name a node before themselves.

        For children that were sampled, list siblings in the order they were drawn.
        """

    @staticmethod
    def chain(tokens: Sequence[int]) -> TokenTree:
        """`tokens[0]` is the root, each of the others follows the one before it."""

    @staticmethod
    def from_choices(
        root: int, choices: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> TokenTree:
        """A tree of fixed shape, as Medusa's (arXiv:2401.10774).

        `choices`: a path per node, `[0, 2]` being the third candidate at depth 2 after the first
        at depth 1. The path without its last rank must be there too; any order. `candidates[d]`:
        the tokens that ranks at depth d + 1 stand for, the likeliest first. Nodes are numbered by
        depth, then by path.
        """

    @staticmethod
    def best_first(
        root: int,
        candidates: Sequence[Sequence[int]],
        probs: Sequence[Sequence[float]],
        max_nodes: int = 64,
    ) -> TokenTree:
        """The likeliest tree of at most `max_nodes` where depths are drafted independently.

        `candidates[d]` and their `probs[d]`, in [0, 1] and in any order, are those at depth d + 1
        below every node, as the heads of Medusa give them. Nodes are added by the product of
        probabilities along their path, the largest first, so the expected number of accepted
        tokens is as large as such a tree can make it; of equal products, the children of the
        earlier node come first, then the earlier candidate. A product of 0 adds nothing.
        """

    @staticmethod
    def most_likely(
        tokens: Sequence[int],
        parents: Sequence[int],
        probs: Sequence[float],
        max_nodes: int = 64,
    ) -> TokenTree:
        """The likeliest `max_nodes` nodes of a larger tree, as EAGLE-2 chooses (arXiv:2406.16858).

        `tokens`, `parents`: a tree of any size. `probs`: each node's probability given its parent,
        in [0, 1]; the root's is not looked at. Kept are the nodes with the largest products along
        their paths, in that order, of equal ones the earlier; none whose product is 0. Choosing
        like that is for deterministic children: the rule for sampled ones would be biased by it.
        """

    @staticmethod
    def prompt_lookup(
        context: Sequence[int], max_ngram: int, max_draft: int, max_nodes: int = 64
    ) -> TokenTree:
        """What followed earlier occurrences of the context's last tokens; needs no draft model.

        `context`: at least one token; its last is the root. Earlier places that end in the same
        n-gram (n up to `max_ngram`) draft the `max_draft` tokens after them, places with the
        longest n first, then the most recent, until the tree has `max_nodes` nodes; equal
        beginnings share nodes. A draft that reaches the end of the context goes on with its own
        beginning, as repetition does. Without an earlier place the root stands alone.
        """

    def __len__(self) -> int:
        """Nodes, the root included."""

    @property
    def tokens(self) -> list[int]:
        """The token of each node."""

    @property
    def parents(self) -> list[int]:
        """The parent of each node; -1 for the root."""

    @property
    def depths(self) -> list[int]:
        """Each node's distance from the root: its position in the text less the root's."""

    @property
    def first_child(self) -> list[int]:
        """The child that is tried first; -1 for a leaf."""

    @property
    def next_sibling(self) -> list[int]:
        """The node that is tried after this one; -1 for the last, and for the root."""

    @property
    def mask_bits(self) -> list[int]:
        """What each node attends to: bit j is set if j is the node or an ancestor of it.

        As int64: the word of a node 63 is negative.
        """
