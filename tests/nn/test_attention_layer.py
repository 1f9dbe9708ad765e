"""nn.PagedAttention: in the place of transformers' attention, and against a dense computation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn

from effllm._host import TokenTree
from effllm.cache import PagedContext, PagedKVCache
from effllm.nn import PagedAttention
from effllm.ops._kv_codes import as_bits
from effllm.ops.rope_kv_append import rotate_ref
from effllm.testing.cases.rope_kv_append import rotary_tables
from effllm.testing.compare import assert_equal


class Replacement(nn.Module):
    """A transformers attention module with its projections and norms, but our attention; given
    tables of cos and sin, it leaves the rotation to that too."""

    def __init__(
        self, original: Any, config: Any, rotary: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.original = original
        self.layer = original.layer_idx
        self.attention = PagedAttention(
            config.num_attention_heads,
            config.num_key_value_heads,
            original.head_dim,
            scale=original.scaling,
            window=getattr(original, "sliding_window", None),
            softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        effllm: PagedContext,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        ours = self.original
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, ours.head_dim))
            for projection in (ours.q_proj, ours.k_proj, ours.v_proj)
        )
        if hasattr(ours, "q_norm"):
            q, k = ours.q_norm(q), ours.k_norm(k)
        if self.rotary is None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        out = self.attention(q.flatten(2), k, v, effllm, self.layer, rotary=self.rotary)
        return ours.o_proj(out.squeeze(0)), None


MODELS = {
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-gqa": ("LlamaConfig", {}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2-window": (
        "Qwen2Config",
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 25},
    ),
}


@pytest.mark.parametrize("rotates", [False, True], ids=["rotated", "rotates"])
@pytest.mark.parametrize("name", MODELS)
def test_in_the_place_of_transformers_attention(name: str, rotates: bool) -> None:
    """Two sequences: chunks of a prompt and single tokens, against one eager pass over each."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    config_name, options = MODELS[name]
    config = getattr(transformers, config_name)(**(TINY | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    sequences = [torch.randint(1, 97, (n,)) for n in (11, 7)]
    with torch.no_grad():
        expected = [model(input_ids=tokens[None]).logits[0] for tokens in sequences]

    rotary = None
    if rotates:
        # transformers repeats each table for the second halves.
        cos, sin = model.model.rotary_emb(torch.empty(0), torch.arange(16)[None])
        rotary = (cos[0].chunk(2, -1)[0], sin[0].chunk(2, -1)[0])
    for layer in model.model.layers:
        layer.self_attn = Replacement(layer.self_attn, config, rotary)
    cache = PagedKVCache(
        2,
        config.num_key_value_heads,
        model.model.layers[0].self_attn.original.head_dim,
        max_batch=2,
        max_seq_len=16,
        page_size=4,
        dtype=torch.float32,
    )
    seqs = [cache.add(), cache.add()]
    for counts in ((6, 2), (1, 4), (1, 0), (3, 1)):
        starts = [cache.length(seq) for seq in seqs]
        chosen = [row for row in range(2) if counts[row]]
        batch = cache.step([(seqs[row], counts[row]) for row in chosen])
        parts = [slice(starts[row], starts[row] + counts[row]) for row in chosen]
        with torch.no_grad():
            logits = model(
                input_ids=torch.cat([sequences[r][p] for r, p in zip(chosen, parts, strict=True)])[
                    None
                ],
                position_ids=batch.positions[None],
                effllm=PagedContext(cache, batch),
                use_cache=False,
            ).logits[0]
        wanted = torch.cat([expected[r][p] for r, p in zip(chosen, parts, strict=True)])
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotates", [False, True], ids=["rotated", "rotates"])
@pytest.mark.parametrize("replaced", [False, True], ids=["attn_implementation", "replaced"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-window"])
def test_a_step_of_trees_gives_each_branch_its_own_text(
    name: str, replaced: bool, rotates: bool
) -> None:
    """Logits of every node, against one eager pass over prompt and branch."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    if rotates and not replaced:
        pytest.skip("transformers rotates itself")
    config_name, options = MODELS[name]
    config = getattr(transformers, config_name)(**(TINY | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    prompts = [torch.randint(1, 97, (n,)).tolist() for n in (7, 3)]
    trees = [
        TokenTree([11, 12, 13, 14, 15, 16], [-1, 0, 0, 1, 2, 4]),
        TokenTree([21, 22, 23], [-1, 0, 0]),
    ]
    expected = []
    for prompt, tree in zip(prompts, trees, strict=True):
        for word in tree.mask_bits:
            branch = [token for node, token in enumerate(tree.tokens) if word >> node & 1]
            with torch.no_grad():
                expected.append(model(input_ids=torch.tensor([prompt + branch])).logits[0, -1])

    if replaced:
        rotary = None
        if rotates:
            cos, sin = model.model.rotary_emb(torch.empty(0), torch.arange(16)[None])
            rotary = (cos[0].chunk(2, -1)[0], sin[0].chunk(2, -1)[0])
        for layer in model.model.layers:
            layer.self_attn = Replacement(layer.self_attn, config, rotary)
    else:
        model.set_attn_implementation("effllm")
    dim = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    cache = PagedKVCache(
        2, heads, dim, max_batch=2, max_seq_len=16, page_size=4, dtype=torch.float32
    )
    seqs = [cache.add(), cache.add()]

    def run(items: list[tuple[int, int]], tokens: list[int], *drafts: TokenTree) -> Tensor:
        batch = cache.step(items)
        if drafts:
            batch = batch.with_trees(drafts)
        with torch.no_grad():
            return model(
                input_ids=torch.tensor([tokens]),
                position_ids=batch.positions[None],
                effllm=PagedContext(cache, batch),
                use_cache=False,
            ).logits[0]

    run([(seqs[0], 7), (seqs[1], 3)], prompts[0] + prompts[1])
    logits = run([(seqs[0], 6), (seqs[1], 3)], trees[0].tokens + trees[1].tokens, *trees)
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def stepped(
    device: str, dtype: torch.dtype, num_kv_heads: int, num_tokens: int = 6, **options: Any
) -> tuple[PagedKVCache, PagedContext]:
    cache = PagedKVCache(
        2,
        num_kv_heads,
        32,
        max_batch=1,
        max_seq_len=8,
        page_size=4,
        dtype=dtype,
        device=device,
        **options,
    )
    return cache, PagedContext(cache, cache.step([(cache.add(), num_tokens)]))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_values_of_packed_projections(num_kv_heads: int, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    _, context = stepped(device, dtype, num_kv_heads)
    qkv = torch.randn(6, (4 + 2 * num_kv_heads) * 32).to(device, dtype)
    q, k, v = qkv.split([4 * 32, num_kv_heads * 32, num_kv_heads * 32], dim=1)
    attention = PagedAttention(4, num_kv_heads, 32, scale=0.2)
    flat = attention(q, k, v, context, layer=1)
    exact = nn.functional.scaled_dot_product_attention(
        *(x.double().unflatten(-1, (-1, 32)).transpose(0, 1) for x in (q, k, v)),
        is_causal=True,
        scale=0.2,
        enable_gqa=True,
    ).transpose(0, 1)
    tolerance = 1e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(flat.double(), exact.flatten(1), atol=tolerance, rtol=tolerance)
    # By heads, and with a batch dimension of 1: the same numbers in the shape of q.
    by_heads = [x.unflatten(-1, (-1, 32)) for x in (q, k, v)]
    assert torch.equal(attention(*by_heads, context, layer=0), flat.view(6, 4, 32))
    assert torch.equal(attention(q[None], k[None], v[None], context, layer=0), flat[None])


def test_first_tokens_sinks_and_slopes(device: str) -> None:
    """All that changes the scores, token by token, against a dense softmax."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(20, heads, 32, generator=generator).to(device, dtype) for heads in (4, 2, 2)
    )
    cache = PagedKVCache(
        1, 2, 32, max_batch=1, max_seq_len=20, page_size=4, dtype=dtype, device=device
    )
    attention = PagedAttention(4, 2, 32, window=5, sink_tokens=3, split_size=64)
    sequence = cache.add()
    biases = {
        "sinks": torch.tensor([0.0, 2.0, -1.0, 4.0], device=device).bfloat16(),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0], device=device).bfloat16(),
    }
    out = torch.cat(
        [
            attention(
                *(x[rows] for x in (q, k, v)), PagedContext(cache, cache.step(step)), 0, **biases
            )
            for rows, step in (
                (slice(0, 12), [(sequence, 12)]),
                *((slice(i, i + 1), [(sequence, 1)]) for i in range(12, 20)),
            )
        ]
    )
    position = torch.arange(20, device=device)
    distance = position[:, None] - position
    visible = (distance >= 0) & ((distance < 5) | (position < 3))
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * 32**-0.5
    scores -= biases["alibi_slopes"].double()[:, None, None] * distance
    scores = scores.masked_fill(~visible, -torch.inf)
    column = biases["sinks"].double()[:, None, None].expand(4, 20, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("hqk,khd->qhd", weights, values)
    tolerance = 1e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_rotation_inside_is_rotation_before(
    kv_dtype: str | None, interleaved: bool, device: str
) -> None:
    """To the bit, in the outputs and in the pages; part of each head, over two steps."""
    torch.manual_seed(0)
    qkv = torch.randn(6, 8, 32).to(device, torch.bfloat16)
    tables = rotary_tables(8, 16, device)
    results = []
    for rotates in (False, True):
        cache, context = stepped(device, torch.bfloat16, 2, 4, kv_dtype=kv_dtype)
        attention = PagedAttention(4, 2, 32, interleaved=interleaved and rotates)
        outs = []
        for part in (slice(0, 4), slice(4, 6)):
            q, k, v = qkv[part].split([4, 2, 2], dim=1)
            if part.start:
                context = PagedContext(cache, cache.step([(0, 2)]))
            if rotates:
                outs.append(attention(q, k, v, context, 1, rotary=tables))
            else:
                positions = torch.arange(part.start, part.stop, device=device)
                q, k = (rotate_ref(x, *tables, positions, interleaved=interleaved) for x in (q, k))
                outs.append(attention(q, k, v, context, 1))
        pages = context.batch.page_table[0, :2].long()
        written = [as_bits(x)[pages].flatten(0, 1)[:6] for x in cache.layer(1) if x is not None]
        results.append([torch.cat(outs), *written])
    for before, inside in zip(*results, strict=True):
        assert_equal(inside, before)


def test_it_holds_no_state() -> None:
    attention = PagedAttention(8, 2, 64, window=100, softcap=30.0)
    assert not attention.state_dict()
    assert not list(attention.parameters())
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert repr(other) == "PagedAttention(8, 2, head_dim=64, window=100, softcap=30.0)"
    assert repr(PagedAttention(8, 2, 64, interleaved=True)) == (
        "PagedAttention(8, 2, head_dim=64, interleaved=True)"
    )
    assert repr(PagedAttention(8, 2, 64)) == "PagedAttention(8, 2, head_dim=64)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "multiple of num_kv_heads, got 6 and 4"),
        ({"num_kv_heads": 0}, "multiple of num_kv_heads, got 8 and 0"),
        ({"head_dim": 60}, "head_dim must be a multiple of 8 up to 256, got 60"),
        ({"head_dim": 264}, "head_dim must be a multiple of 8 up to 256, got 264"),
        ({"head_dim": 0}, "head_dim must be a multiple of 8 up to 256, got 0"),
        ({"window": 0}, "window must be at least 1 or None, got 0"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PagedAttention: .*{message}"):
        PagedAttention(**{"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, **arguments})


def test_wrong_heads_are_named() -> None:
    _, context = stepped("cpu", torch.float32, 2)
    attention = PagedAttention(4, 2, 32)
    q, k = torch.ones(6, 128), torch.ones(6, 64)
    with pytest.raises(ValueError, match=r"k must be \[..., 64\] or \[..., 2, 32\], got"):
        attention(q, q, k, context, 0)
    with pytest.raises(ValueError, match=r"q must be \[..., 128\] or \[..., 4, 32\], got"):
        attention(k, k, k, context, 0)
    with pytest.raises(RuntimeError, match=r"slot_mapping must be \[T\] = \[5\], got \[6\]"):
        attention(q[:5], k[:5], k[:5], context, 0)


def test_a_backward_pass_raises() -> None:
    _, context = stepped("cpu", torch.float32, 2)
    q = torch.ones(6, 128, requires_grad=True)
    out = PagedAttention(4, 2, 32)(q, torch.ones(6, 64), torch.ones(6, 64), context, 0)
    with pytest.raises(RuntimeError, match="paged_attention is an inference op"):
        out.sum().backward()
    rotary = rotary_tables(8, 32)
    out = PagedAttention(4, 2, 32)(q, *torch.ones(2, 6, 64), context, 0, rotary=rotary)
    with pytest.raises(RuntimeError, match="paged_attention is an inference op"):
        out.sum().backward()


def test_compiles_without_graph_breaks() -> None:
    _, context = stepped("cpu", torch.float32, 2)
    attention = PagedAttention(4, 2, 32)
    q, k = torch.randn(6, 128), torch.randn(6, 64)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, k, context, 0), attention(q, k, k, context, 0))
    rotary = rotary_tables(8, 32)
    expected = attention(q, k, k, context, 0, rotary=rotary)
    assert not torch.equal(expected, attention(q, k, k, context, 0))
    assert torch.equal(compiled(q, k, k, context, 0, rotary=rotary), expected)
