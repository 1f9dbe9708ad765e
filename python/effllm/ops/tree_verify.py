"""tree_verify: which draft tokens the target model keeps, without changing what it would say."""

import torch
from torch import Tensor

from .._load import ops

_op = ops.tree_verify.default


def tree_verify(
    logits: Tensor,
    tokens: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    cu_nodes: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    draft_probs: Tensor | None = None,
    *,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept a path through each tree of draft tokens and choose the token after it.

    Lossless: the text has the law of decoding without drafts, greedily even its tokens. Children of
    a node are tried in order. Greedily one is accepted that is the likeliest token (of equal ones
    the lowest). Sampled, with p what temperature, top_k and top_p make of the node's logits: a
    child that was certain to be tried is accepted with probability p, else taken out of p; one that
    was drawn from q, as ``draft_probs`` says, with probability min(1, p / q), else p becomes
    max(p - q, 0), normalised, and the child is taken out of q. If no child is accepted the token
    is drawn from what p has become. Trees must not depend on the numbers drawn here, and a draft
    that re-ranks what it sampled must not pass ``draft_probs``.

    Only rows of accepted nodes are read, and no [T, V] of probabilities is made. Numbers drawn
    depend on a request's seed and a node's position alone: it says the same in any batch.

    Args:
        logits: [T, V], fp16, bf16 or fp32, any row stride, stride(-1) == 1: the target model's at
            every node, the nodes of one tree after those of another. NaN counts as -inf.
        tokens: int64 [T]: the token of each node. Node 0 of a tree, the root, is the last token
            that is certain; its own token is not looked at.
        first_child, next_sibling: int32 [T]: numbers of nodes within the tree, greater than the
            node's own, or -1, as ``effllm._host.TokenTree`` gives them. Siblings that were drawn
            stand in the order they were drawn.
        cu_nodes: int32 [B + 1]: tree b has nodes cu_nodes[b] .. cu_nodes[b + 1] - 1, none being
            allowed (padding rows of a CUDA graph); rows beyond belong to no tree.
        temperature: fp32 [B], divides the logits; 0 is greedy.
        top_k: int32 [B]: keep the k likeliest tokens, of equal ones the lower; 0 keeps all.
        top_p: fp32 [B], in (0, 1]: of those the fewest likeliest whose probabilities reach top_p.
        seed: int64 [B]: of each request.
        position: int64 [B]: of each root in its text, in tokens.
        draft_probs: fp32 [T, V], any row stride, stride(-1) == 1: row i is the law that children of
            node i were drawn from without replacement, finite; it need not be normalised. A child
            whose entry is 0 was certain to be tried. None: all were.
        max_nodes: W, of the largest tree at least, 1 to 1024.

    Returns:
        accept_index int32 [B, W], the accepted path as numbers of nodes, root first, then -1;
        num_accepted int32 [B], the length of the path, the root included: how many tokens' keys and
        values to keep, and how many tokens are new, the next one included; next_token int64 [B].
        A tree without nodes gets 0 and 0.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape or stride; or, on the CPU, a link, token or
            sampling parameter out of range, before anything is computed. A GPU, which cannot raise,
            takes such a link for -1, such a temperature for 0, and such a top_k or top_p for all.

    Source:
        csrc/spec/tree_verify.h. Drawn children as in SpecInfer (arXiv:2305.09781) and Sequoia
        (arXiv:2402.12374); a point mass as q is the case of one certain child (arXiv:2211.17192).
    """
    return _op(
        logits,
        tokens,
        first_child,
        next_sibling,
        cu_nodes,
        temperature,
        top_k,
        top_p,
        seed,
        position,
        draft_probs,
        max_nodes=max_nodes,
    )


@torch.library.register_fake(_op.name())
def _fake(
    logits: Tensor,
    tokens: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    cu_nodes: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    draft_probs: Tensor | None = None,
    *,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        logits.dim() == 2, lambda: f"tree_verify: logits must be [T, V], got {list(logits.shape)}"
    )
    for name, tensor in (
        ("tokens", tokens), ("first_child", first_child), ("next_sibling", next_sibling)
    ):  # fmt: skip
        torch._check(
            tensor.shape == logits.shape[:1],
            lambda name=name, tensor=tensor: (
                f"tree_verify: {name} must be [T] = [{logits.shape[0]}], got {list(tensor.shape)}"
            ),
        )
    torch._check(
        temperature.dim() == 1,
        lambda: f"tree_verify: temperature must be [B], got {list(temperature.shape)}",
    )
    num_trees = temperature.shape[0]
    for name, tensor in (
        ("top_k", top_k),
        ("top_p", top_p),
        ("seed", seed),
        ("position", position),
    ):
        torch._check(
            tensor.shape == temperature.shape,
            lambda name=name, tensor=tensor: (
                f"tree_verify: {name} must be [B] = [{num_trees}], got {list(tensor.shape)}"
            ),
        )
    torch._check(
        cu_nodes.dim() == 1 and cu_nodes.shape[0] == num_trees + 1,
        lambda: f"tree_verify: cu_nodes must be [B + 1], got {list(cu_nodes.shape)}",
    )
    if draft_probs is not None:
        torch._check(
            draft_probs.shape == logits.shape,
            lambda: (
                f"tree_verify: draft_probs must be [T, V] = {list(logits.shape)}, "
                f"got {list(draft_probs.shape)}"
            ),
        )
    return (
        logits.new_empty(num_trees, max_nodes, dtype=torch.int32),
        logits.new_empty(num_trees, dtype=torch.int32),
        logits.new_empty(num_trees, dtype=torch.int64),
    )


def _uniform(seed: int, position: int, draw: int, kind: int) -> float:
    """Philox4x32-10 (Salmon et al., SC 2011) at counter (position, draw, kind), in [0, 1)."""
    low = 2**32 - 1
    key = [seed & low, seed >> 32 & low]
    a, b, c, d = position & low, position >> 32 & low, draw, kind
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ key[0], right & low, left >> 32 ^ d ^ key[1], left & low
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return float((a << 32 | b) >> 11) * 2.0**-53


def sampling_weights(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The law of a row's next token up to a factor, [V] in the dtype of logits [V], fp32 or fp64.

    Args:
        logits: [V]; NaN counts as -inf.
        temperature: above 0.
        top_k: 0 for all.
        top_p: in (0, 1].
    """
    values, order = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(
        descending=True, stable=True
    )
    weights = torch.where(values == values[0], 1.0, ((values - values[0]) / temperature).exp())
    if top_k > 0:
        weights[top_k:] = 0.0
    if top_p < 1.0:
        before = weights.cumsum(0).roll(1)
        before[0] = 0.0
        weights = weights.where(before < top_p * weights.sum(), 0.0)
    return torch.empty_like(weights).scatter_(0, order, weights)


def tree_verify_ref(
    logits: Tensor,
    tokens: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    cu_nodes: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    draft_probs: Tensor | None = None,
    *,
    max_nodes: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """By definition, with the probabilities of each visited node as a tensor of ``dtype``."""
    ints = [
        t.tolist() for t in (tokens, first_child, next_sibling, cu_nodes, top_k, seed, position)
    ]
    token_of, first, following, starts, top_ks, seeds, positions = ints
    paths: list[list[int]] = []
    chosen: list[int] = []
    for b, (t, nucleus) in enumerate(zip(temperature.tolist(), top_p.tolist(), strict=True)):
        start, path, next_token = starts[b], [], 0
        node = 0 if starts[b + 1] > start else -1
        while node >= 0:
            path.append(node)
            children = []
            child = first[start + node]
            while child >= 0:
                children.append(child)
                child = following[start + child]
            row, here = logits[start + node].to(dtype), positions[b] + len(path) - 1
            node = -1
            if t == 0:
                next_token = int(row.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax())
                matching = [c for c in children if token_of[start + c] == next_token]
                node = matching[0] if matching else -1
                continue
            p = target = sampling_weights(row, t, top_ks[b], nucleus)
            p = p / p.sum()
            q = torch.zeros_like(p)
            if draft_probs is not None:
                q = draft_probs[start + path[-1]].to(dtype).clamp(min=0)
            for draw, child in enumerate(children):
                x, coin = token_of[start + child], _uniform(seeds[b], here, draw, 0)
                law = q / q.sum() if q[x] > 0 else torch.zeros_like(q).index_fill_(0, _at(x, q), 1)
                if coin * law[x] < p[x]:
                    node = child
                    break
                # A certain child leaves of the others what they have, a drawn one p - q.
                p = (p - law).clamp(min=0) if q[x] > 0 else p.index_fill(0, _at(x, p), 0)
                q = q.index_fill(0, _at(x, q), 0)
                if p.sum() == 0:
                    break
                p = p / p.sum()
            if node < 0:
                p = p if p.sum() > 0 else target
                cumulative = p.cumsum(0)
                threshold = _uniform(seeds[b], here, 0, 1) * cumulative[-1]
                last = int(p.nonzero()[-1])
                next_token = min(int((cumulative <= threshold).sum()), last)
        paths.append(path)
        chosen.append(next_token)

    accept_index = torch.full((len(paths), max_nodes), -1, dtype=torch.int32)
    for b, path in enumerate(paths):
        accept_index[b, : len(path)] = torch.tensor(path, dtype=torch.int32)
    return (
        accept_index.to(logits.device),
        torch.tensor([len(p) for p in paths], dtype=torch.int32, device=logits.device),
        torch.tensor(chosen, dtype=torch.int64, device=logits.device),
    )


def _at(index: int, like: Tensor) -> Tensor:
    return torch.tensor([index], device=like.device)
