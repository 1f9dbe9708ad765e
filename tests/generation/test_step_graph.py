"""Steps over fixed memory, and CUDA graphs of them, against steps as they come.

On the CPU a graph is the call that it would record: it reads and writes the same memory.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted_draft import Scripted, random_tree
from tiny_models import TINY
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import effllm
from effllm.cache import PagedKVCache
from effllm.generation import step_graph
from effllm.speculative import ModelDraft, NGramDraft

VOCAB = 97
PROMPTS = [
    [5, 17, 42, 8, 3, 77, 61],
    [11],
    [90, 33, 21, 54],
    list(range(1, 41)),  # more than two pages
    [7, 8, 7, 8, 7, 8, 7],
]


def tokens_of(results: list[effllm.Generation]) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.fixture
def fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda_graphs=None takes them on the CPU as well."""
    monkeypatch.setattr(step_graph, "graph_problem", lambda model: None)


def seen_ids(model: Any) -> list[torch.Tensor]:
    """The input_ids of every call of the model from now on, as they are, not copied."""
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    return seen


def scripted_trees(plain: list[effllm.Generation], seed: int = 0) -> Scripted:
    texts = [prompt + r.tokens for prompt, r in zip(PROMPTS, plain, strict=True)]
    random = Random(seed)
    return Scripted(lambda request: random_tree(request, texts, random, VOCAB))


@pytest.mark.usefixtures("fixed_memory")
def test_plain_steps_have_few_shapes_each_at_one_address(llama: Any) -> None:
    """Sequences that end leave rows behind that nothing comes of."""
    free = effllm.generate(llama, PROMPTS, max_new_tokens=40, cuda_graphs=False)
    stops = [free[0].tokens[3], free[2].tokens[20]]
    options: dict[str, Any] = {"max_new_tokens": 40, "stop_tokens": stops}
    plain = effllm.generate(llama, PROMPTS, cuda_graphs=False, **options)
    ends = {len(r.tokens) for r in plain}
    assert len(ends) > 2
    seen = seen_ids(llama)
    assert effllm.generate(llama, PROMPTS, **options) == plain
    prompts, *steps = seen
    assert prompts.shape == (1, sum(map(len, PROMPTS)))
    assert len(steps) == max(ends) - 1
    assert {ids.shape[1] for ids in steps} <= {1, 2, 4, 5}  # no more than max_batch, which fits
    assert len({ids.data_ptr() for ids in steps}) == len({ids.shape for ids in steps})


@pytest.mark.usefixtures("fixed_memory")
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], PROMPTS[1:2]])
@pytest.mark.parametrize("kv_dtype", [None, "e4m3", "int8", "int4"])
def test_plain_text(llama: Any, prompts: list[list[int]], kv_dtype: str | None) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "kv_dtype": kv_dtype}
    for sampled in ({}, {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 3}):
        plain = effllm.generate(llama, prompts, cuda_graphs=False, **sampled, **options)
        assert effllm.generate(llama, prompts, **sampled, **options) == plain


@pytest.mark.usefixtures("fixed_memory")
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("nodes", [2, 5, 12, 64])
def test_trees(llama: Any, nodes: int, kv_dtype: str | None) -> None:
    """Of any sizes and shapes in one step, which is padded to a power of two of each."""
    options: dict[str, Any] = {"max_new_tokens": 24, "kv_dtype": kv_dtype}
    plain = effllm.generate(llama, PROMPTS, cuda_graphs=False, **options)
    eager = effllm.generate(
        llama, PROMPTS, draft=scripted_trees(plain), tree=nodes, cuda_graphs=False, **options
    )
    seen = seen_ids(llama)
    results = effllm.generate(llama, PROMPTS, draft=scripted_trees(plain), tree=nodes, **options)
    assert results == eager
    assert tokens_of(results) == tokens_of(plain)
    fixed = [ids for ids in seen if ids.shape[1] != sum(map(len, PROMPTS))]
    rows = {1, 2, 4, 5}
    assert {ids.shape[1] for ids in fixed} <= {n * 2**e for n in rows for e in range(7)}
    assert len({ids.data_ptr() for ids in fixed}) <= 3 * 2 * 7


@pytest.mark.usefixtures("fixed_memory")
@pytest.mark.parametrize("temperature", [None, 1.2])
@pytest.mark.parametrize("candidates", [1, 3])
def test_drafts_of_a_quantised_target(
    llama: Any, candidates: int, temperature: float | None
) -> None:
    torch.manual_seed(1)
    small = type(llama)(llama.config).eval()
    effllm.quantize_(llama, effllm.Int4Config(group_size=32))
    options: dict[str, Any] = {
        "max_new_tokens": 20, "tree": 6, "temperature": temperature, "kv_dtype": "int8"
    }  # fmt: skip
    sizes = {"depth": 3, "candidates": candidates}
    for draft, eager_draft in (
        (ModelDraft(small, **sizes), ModelDraft(small, cuda_graphs=False, **sizes)),
        (NGramDraft(2, 3), NGramDraft(2, 3)),
    ):
        eager = effllm.generate(llama, PROMPTS, draft=eager_draft, cuda_graphs=False, **options)
        assert effllm.generate(llama, PROMPTS, draft=draft, **options) == eager


@pytest.mark.usefixtures("fixed_memory")
@pytest.mark.parametrize("right", [True, False])
def test_steps_of_a_draft_model_have_few_shapes(llama: Any, right: bool) -> None:
    """Where all its drafts came true, it is fed the last of them and the target's token; else one
    token at a time."""
    torch.manual_seed(1)
    model = copy.deepcopy(llama) if right else type(llama)(llama.config).eval()
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=24, cuda_graphs=False)
    fed = seen_ids(model)
    draft = ModelDraft(model, depth=3)
    results = effllm.generate(llama, PROMPTS, max_new_tokens=24, draft=draft, tree=4)
    assert tokens_of(results) == tokens_of(plain)
    sizes = [ids.shape[1] for ids in fed]
    assert sizes[0] == sum(map(len, PROMPTS)) + len(PROMPTS)
    if right:
        assert set(sizes[1:]) == {5, 10}
    assert set(sizes[1:]) <= {rows * n for rows in (1, 2, 4, 5) for n in (1, 2)}
    assert len({ids.data_ptr() for ids in fed[1:]}) < len(fed) / 2


def given_cache() -> PagedKVCache:
    return PagedKVCache(3, 2, 16, max_batch=7, max_seq_len=100, page_size=4, dtype=torch.float32)


@pytest.mark.usefixtures("fixed_memory")
def test_shared_prefixes_and_sequences_that_wait(llama: Any) -> None:
    """Tables change under the graph: pages that were found, and those of a sequence that was moved
    to the host and back between two steps."""
    plain = effllm.generate(llama, PROMPTS, max_new_tokens=24, cuda_graphs=False)
    cache = given_cache()
    for draft in (None, scripted_trees(plain), scripted_trees(plain, 1)):
        moved: list[tuple[int, ...]] = []

        def move(index: int, token: int, text: str, moved: Any = moved) -> None:
            if index == 1 and len(moved) < 6:
                seq = max(cache._seqs) - 3  # of prompt 1 of 5, the others came after it
                before = cache.pages(seq)
                cache.swap_out(seq)
                held = cache.pool.allocate(1)  # what it had may not come back
                cache.swap_in(seq)
                cache.pool.release(held)
                moved.append((before[0], cache.pages(seq)[0]))

        results = effllm.generate(
            llama, PROMPTS, max_new_tokens=24, cache=cache, draft=draft, tree=6, stream=move
        )
        assert tokens_of(results) == tokens_of(plain)
        assert any(old != new for old, new in moved)
        assert cache.pool.num_free == cache.pool.num_pages - 1


@pytest.mark.usefixtures("fixed_memory")
def test_a_shape_is_recorded_when_it_comes_again(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, replayed = [], []

    def record(self: Any, forward: Any, bucket: Any) -> Callable[[], Any]:
        number = len(recorded)
        recorded.append(number)

        def replay() -> Any:
            replayed.append(number)
            return forward(bucket.batch, bucket.ids)

        return replay

    monkeypatch.setattr(step_graph.StepGraphs, "_record", record)
    plain = effllm.generate(llama, PROMPTS[:1], max_new_tokens=8, cuda_graphs=False)
    for new_tokens, replays in ((1, 0), (2, 0), (3, 1), (8, 6)):
        recorded.clear(), replayed.clear()
        (result,) = effllm.generate(llama, PROMPTS[:1], max_new_tokens=new_tokens)
        assert result.tokens == plain[0].tokens[:new_tokens]
        assert (len(recorded), len(replayed)) == (min(replays, 1), replays)


@pytest.mark.usefixtures("fixed_memory")
def test_graphs_go_with_the_call(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: their memory is too much to wait for the collector."""
    made: list[weakref.ref[Any]] = []
    make = step_graph.StepGraphs.__init__

    def noted(self: Any, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        make(self, *arguments)

    monkeypatch.setattr(step_graph.StepGraphs, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        for draft in (None, NGramDraft(), ModelDraft(llama)):
            effllm.generate(llama, PROMPTS, max_new_tokens=8, draft=draft)
        left = [reference() for reference in made]
    finally:
        gc.enable()
    assert left == [None] * 4


@pytest.mark.usefixtures("fixed_memory")
def test_a_larger_graph_takes_the_first_steps_of_a_shape(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        step_graph.StepGraphs,
        "_record",
        lambda self, forward, bucket: lambda: forward(bucket.batch, bucket.ids),
    )
    free = effllm.generate(llama, PROMPTS, max_new_tokens=60, cuda_graphs=False)
    # All but one end early, none of them at the second step, which is the first that is recorded.
    stop = next(
        token for token in free[3].tokens[4:] if all(token not in r.tokens[:4] for r in free)
    )
    options: dict[str, Any] = {"max_new_tokens": 60, "stop_tokens": [stop]}
    plain = effllm.generate(llama, PROMPTS, cuda_graphs=False, **options)
    lengths = sorted(len(r.tokens) for r in plain)
    assert lengths[0] < lengths[-1] == 60
    fed = seen_ids(llama)
    assert effllm.generate(llama, PROMPTS, **options) == plain
    sizes = [ids.shape[1] for ids in fed][1:]
    live = [sum(n > step for n in lengths) for step in range(1, 60)]
    came: dict[int, int] = {}
    for size, rows in zip(sizes, live, strict=True):
        own = next(n for n in (1, 2, 4, 5) if n >= rows)
        came[own] = came.get(own, 0) + 1
        larger = [n for n in set(sizes) if n > own]
        assert size == own if came[own] > 16 or own == 5 else size in larger
    assert any(own < 5 and n > 16 for own, n in came.items())


def test_which_graphs_take_the_steps_of_others() -> None:
    shape = step_graph._Shape
    large = shape(16, 64, True)
    assert large.may_replace(shape(16, 32, True))
    assert large.may_replace(shape(4, 64, True))
    assert not large.may_replace(shape(2, 64, True))  # 8 times the tokens, and they are many
    assert not large.may_replace(shape(16, 32, False))
    assert shape(16, 4, False).may_replace(shape(1, 1, False))
    assert not shape(16, 4, False).may_replace(shape(1, 8, False))
    assert not shape(1, 64, False).may_replace(shape(2, 1, False))


class Capturing(TorchFunctionMode):
    """What a stream that is capturing refuses: to tell the host values, or to take some of its."""

    REFUSED = frozenset(
        [
            "item",
            "tolist",
            "cpu",
            "numpy",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "masked_select",
            "unique",
            "equal",
            "allclose",
            "tensor",
            "as_tensor",
            "repeat_interleave",
        ]
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.REFUSED, f"{name} during capture"
        masks = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        assert name != "__getitem__" or not masks, "a mask as an index during capture"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x == 0).all()),
        lambda x: x.max() > 2 or x,
        lambda x: x[x > 1],
        lambda x: torch.tensor([1]),
    ],
)
def test_looks_are_noticed(look: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="during capture"), Capturing():
        look(torch.arange(3))


@pytest.mark.usefixtures("fixed_memory")
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Gemma3", "Mixtral", "GptOss"])
def test_what_is_recorded_looks_at_no_values(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its replay, of operations alone with the numbers that Python had when it was recorded,
    says the same. transformers knows of a capturing stream."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    options = TINY | {"sliding_window": 8, "max_position_embeddings": 64}
    if family in ("Mixtral", "GptOss"):
        options |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    name = f"{family}Text" if family == "Gemma3" else family
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**options)
    ).eval()
    assert model._can_compile_fullgraph
    recorded = []

    def record(self: Any, forward: Any, bucket: Any) -> Callable[[], Any]:
        with monkeypatch.context() as patch, Capturing():
            patch.setattr(transformers.utils.import_utils, "is_cuda_stream_capturing", lambda: True)
            recorded.append(make_fx(lambda: forward(bucket.batch, bucket.ids))())
        return recorded[-1]

    monkeypatch.setattr(step_graph.StepGraphs, "_record", record)
    eager = effllm.generate(model, PROMPTS, max_new_tokens=16, cuda_graphs=False)
    assert effllm.generate(model, PROMPTS, max_new_tokens=16) == eager
    assert len(recorded) == 1
    draft = scripted_trees(eager)
    results = effllm.generate(model, PROMPTS, max_new_tokens=16, draft=draft, tree=4)
    assert tokens_of(results) == tokens_of(eager)
    assert len(recorded) > 1


def model_like(**changes: Any) -> Any:
    """What ``graph_problem`` looks at."""
    modules = changes.pop("modules", [])
    tensors = changes.pop("tensors", [torch.device("cuda", 0)])
    attributes = {"device": torch.device("cuda", 0), "_can_compile_fullgraph": True} | changes
    return SimpleNamespace(
        parameters=lambda: [SimpleNamespace(device=device) for device in tensors],
        modules=lambda: [SimpleNamespace(**module) for module in modules],
        **attributes,
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"modules": [{"rope_type": "llama3"}, {}]}, None),
        ({"device": torch.device("cpu")}, "it is on cpu"),
        ({"tensors": [torch.device("cuda", 0), torch.device("cpu")]}, "not all of it is on cuda:0"),
        ({"tensors": [torch.device("cuda", 1)]}, "not all of it is on cuda:0"),
        ({"_can_compile_fullgraph": False}, "its class does not say _can_compile_fullgraph"),
        ({"modules": [{}, {"rope_type": "dynamic"}]}, "its rotary embedding, 'dynamic', looks"),
        ({"modules": [{"rope_type": {"full_attention": "longrope"}}]}, "'longrope', looks at"),
    ],
)
def test_which_models_have_graphs(changes: dict[str, Any], problem: str | None) -> None:
    model = model_like(**changes)
    found = step_graph.graph_problem(model)
    assert (found is None) == (problem is None)
    assert step_graph.use_graphs(model, None) == (problem is None)
    assert not step_graph.use_graphs(model, False)
    if problem is None:
        assert step_graph.use_graphs(model, True)
        return
    assert problem in str(found)
    with pytest.raises(ValueError, match=f"cuda_graphs must be False or None for .*: .*{problem}"):
        step_graph.use_graphs(model, True)


def test_graphs_cannot_be_insisted_on_without_a_gpu(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"generate: cuda_graphs .* LlamaFor.*: it is on cpu"):
        effllm.generate(llama, PROMPTS, cuda_graphs=True)
