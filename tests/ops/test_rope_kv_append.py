"""rope_kv_append beyond the cases of the contract: the rotation, that it is kv_append after a
rotation to the bit, layouts, what stays untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import kv_append, rope_kv_append
from effllm.ops._kv_codes import QUANTIZED_KV, as_bits
from effllm.ops.rope_kv_append import rope_kv_append_ref, rotate_ref
from effllm.testing import hostile
from effllm.testing.cases.rope_kv_append import RopeKvAppendCase, rotary_tables
from effllm.testing.compare import assert_close_to_reference, assert_equal

CASE = RopeKvAppendCase(7, 2, 64, 4, torch.float16, num_heads=3, rotary_dim=32)
NAMES = (
    "q",
    "k",
    "v",
    "cos",
    "sin",
    "positions",
    "k_cache",
    "v_cache",
    "slot_mapping",
    "k_scale",
    "v_scale",
)
both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])


def check(args: tuple[Tensor, ...], *, interleaved: bool = False) -> None:
    expected = rope_kv_append_ref(*args, interleaved=interleaved)
    out = rope_kv_append(*args, interleaved=interleaved)
    assert out.is_contiguous()
    found = (args[6], args[7], *args[9:], out)
    for name, tensor, wanted in zip(
        (*NAMES[6:8], *NAMES[9 : len(args)], "out"), found, expected, strict=True
    ):
        assert_equal(as_bits(tensor), as_bits(wanted), name=name)


def rotate_alone(x: Tensor, *tables: Tensor, interleaved: bool = False) -> Tensor:
    """The op's rotation of x [T, H, D], as q and as k, which must agree."""
    cos, sin, positions = tables
    tokens, heads, dim = x.shape
    caches = [x.new_empty(tokens, 1, heads, dim) for _ in range(2)]
    slots = torch.arange(tokens, device=x.device)
    out = rope_kv_append(x, x, x, cos, sin, positions, *caches, slots, interleaved=interleaved)
    assert_equal(caches[0][:, 0], out, name="k_cache")
    assert_equal(caches[1][:, 0], x, name="v_cache")
    return out


@both_pairings
@pytest.mark.parametrize("rotary_dim", [2, 32, 64])
@every_dtype
def test_a_pair_rotates_by_its_angle(
    dtype: torch.dtype, rotary_dim: int, interleaved: bool, device: str
) -> None:
    """Against a multiplication of complex numbers in float64, position by position."""
    x = hostile.normal(20, 3, 64, dtype=dtype, device=device)
    positions = torch.arange(100, 120, device=device)
    angles = positions[:, None].double() * 10000.0 ** -(
        torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    )
    rotated, rest = x[..., :rotary_dim].double(), x[..., rotary_dim:]
    axis = -1 if interleaved else -2
    shape = (rotary_dim // 2, 2) if interleaved else (2, rotary_dim // 2)
    pairs = torch.complex(*rotated.unflatten(-1, shape).unbind(axis))
    exact = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    exact = torch.stack([exact.real, exact.imag], axis).flatten(-2)
    tables = (*rotary_tables(120, rotary_dim, device), positions)
    out = rotate_alone(x, *tables, interleaved=interleaved)
    assert_close_to_reference(out[..., :rotary_dim], exact, exact.to(dtype))
    assert_equal(out[..., rotary_dim:], rest)


def test_it_is_what_transformers_computes() -> None:
    """Llama and GPT-NeoX by halves, GPT-J interleaved: the same bits in fp32. In bf16, for which
    transformers rounds the tables and products too, closer to the exact rotation."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from transformers.models.gpt_neox import modeling_gpt_neox as neox
    from transformers.models.gptj import modeling_gptj as gptj
    from transformers.models.llama import modeling_llama as llama

    x = hostile.normal(30, 4, 64)
    positions = torch.arange(30).flip(0)
    for rotary_dim, rotate in ((64, llama.apply_rotary_pos_emb), (16, neox.apply_rotary_pos_emb)):
        cos, sin = rotary_tables(30, rotary_dim)
        full = [torch.cat([table, table], -1)[positions] for table in (cos, sin)]
        wanted, _ = rotate(x, x, *full, unsqueeze_dim=1)
        assert_equal(rotate_alone(x, cos, sin, positions), wanted)
    cos, sin = rotary_tables(30, 64)
    by_pairs = gptj.apply_rotary_pos_emb(x[None], sin[positions][None], cos[positions][None])[0]
    assert_equal(rotate_alone(x, cos, sin, positions, interleaved=True), by_pairs)

    half = x.bfloat16()
    exact = rotate_ref(half.double().float(), cos, sin, positions).double()
    full = [torch.cat([table, table], -1)[positions].bfloat16() for table in (cos, sin)]
    theirs, _ = llama.apply_rotary_pos_emb(half, half, *full, unsqueeze_dim=1)
    ours = rotate_alone(half, cos, sin, positions)
    assert (ours.double() - exact).square().mean() < 0.5 * (theirs.double() - exact).square().mean()


def test_position_zero_and_no_rotary_dims_change_no_bits(device: str) -> None:
    x = hostile.normal(5, 2, 32, dtype=torch.bfloat16, device=device)
    positions = torch.zeros(5, dtype=torch.int64, device=device)
    assert_equal(rotate_alone(x, *rotary_tables(1, 32, device), positions), x)
    assert_equal(rotate_alone(x, *rotary_tables(9, 0, device), positions + 8), x)


@both_pairings
@every_dtype
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED_KV])
@pytest.mark.parametrize("dim", [128, 20])
def test_it_is_kv_append_after_the_rotation(
    dim: int, kv_dtype: str | None, dtype: torch.dtype, interleaved: bool, device: str
) -> None:
    """To the bit: the same codes and scales from the op that gets k rotated."""
    case = RopeKvAppendCase(
        21, 3, dim, 4, dtype, kv_dtype=kv_dtype, rotary_dim=16, interleaved=interleaved
    )
    args, _ = case.make(device)
    q, k, v, cos, sin, positions, *caches = case.make(device)[0]
    key = rotate_ref(k, cos, sin, positions, interleaved=interleaved)
    kv_append(key, v, *caches)
    out = rope_kv_append(*args, interleaved=interleaved)
    assert_equal(out, rotate_ref(q, cos, sin, positions, interleaved=interleaved))
    for name, found, wanted in zip(NAMES[6:], args[6:], caches, strict=False):
        assert_equal(as_bits(found), as_bits(wanted), name=name)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    num_heads=st.integers(0, 6),
    num_kv_heads=st.integers(0, 5),
    dim=st.integers(1, 40),
    data=st.data(),
    page_size=st.integers(1, 20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    kv_dtype=st.sampled_from([None, *QUANTIZED_KV]),
    skip_every=st.sampled_from([None, 1, 2, 3]),
    packed=st.booleans(),
    interleaved=st.booleans(),
)
def test_any_shape(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    data: st.DataObject,
    page_size: int,
    dtype: torch.dtype,
    kv_dtype: str | None,
    skip_every: int | None,
    packed: bool,
    interleaved: bool,
) -> None:
    dim += dim % 2 if kv_dtype == "int4" else 0
    rotary_dim = 2 * data.draw(st.integers(0, dim // 2))
    case = RopeKvAppendCase(
        num_tokens,
        num_kv_heads,
        dim,
        page_size,
        dtype,
        skip_every,
        packed,
        kv_dtype,
        num_heads,
        rotary_dim,
    )
    check(case.make("cpu")[0], interleaved=interleaved)


@pytest.mark.parametrize(
    ("name", "kv_dtype"), [*((name, None) for name in NAMES[:9]), *((n, "int8") for n in NAMES)]
)
def test_any_strides(name: str, kv_dtype: str | None, device: str) -> None:
    index = NAMES.index(name)
    case = replace(CASE, kv_dtype=kv_dtype)
    args, _ = case.make(device)
    is_written = index in (6, 7, 9, 10)
    checked = 0
    for layout, tensor in hostile.odd_strides(args[index]):
        is_scale = index > 8
        if (is_written or index == 8) and layout == "expanded":
            continue  # written twice
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and not is_scale:
            continue
        fresh = list(case.make(device)[0])
        fresh[index] = tensor
        check(tuple(fresh))
        checked += 1
    assert checked > 0


@both_pairings
@every_dtype
def test_elements_that_do_not_rotate_keep_their_bits(
    dtype: torch.dtype, interleaved: bool, device: str
) -> None:
    """NaN payloads, infinities, subnormals and negative zeros included; likewise v."""
    args = list(
        RopeKvAppendCase(50, 2, 64, 16, dtype, skip_every=None, rotary_dim=16).make(device)[0]
    )
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    limits = torch.iinfo(bits)
    for index in range(3):
        words = torch.randint(limits.min, limits.max, args[index].shape, dtype=bits, device=device)
        args[index] = words.view(dtype)
    out = rope_kv_append(*args, interleaved=interleaved)
    pages, offsets = args[8] // 16, args[8] % 16
    assert_equal(out[..., 16:].view(bits), args[0][..., 16:].view(bits), name="q")
    assert_equal(args[6].view(bits)[pages, offsets][..., 16:], args[1][..., 16:].view(bits))
    assert_equal(args[7].view(bits)[pages, offsets], args[2].view(bits), name="v")


@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED_KV])
def test_padding_rows_rotate_and_write_nothing(kv_dtype: str | None, device: str) -> None:
    case = RopeKvAppendCase(6, 2, 64, 4, skip_every=1, kv_dtype=kv_dtype)
    args, _ = case.make(device)
    before = [as_bits(tensor).clone() for tensor in (*args[6:8], *args[9:])]
    out = rope_kv_append(*args)
    assert_equal(out, rotate_ref(args[0], *args[3:6]))
    for tensor, wanted in zip((*args[6:8], *args[9:]), before, strict=True):
        assert_equal(as_bits(tensor), wanted)


@pytest.mark.sanitizer
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED_KV])
@pytest.mark.parametrize("dim", [6, 64])
def test_nothing_is_written_beside_the_cache(dim: int, kv_dtype: str | None, device: str) -> None:
    case = RopeKvAppendCase(4, 2, dim, 4, kv_dtype=kv_dtype, num_heads=3)
    args = list(case.make(device)[0])
    checks = []
    for index in (6, 7, *range(9, len(args))):
        args[index], guard = hostile.guarded(args[index])
        checks.append(guard)
    last = args[6].shape[0] * args[6].shape[1] - 1
    args[8] = torch.tensor([0, last, -1, 1], device=device)
    check(tuple(args))
    for guard in checks:
        guard()


@pytest.mark.sanitizer
@both_pairings
@pytest.mark.parametrize("dim", [6, 64])
def test_tables_are_read_at_the_positions_alone(dim: int, interleaved: bool, device: str) -> None:
    """NaN before, between and behind the rows that positions name."""
    case = RopeKvAppendCase(9, 2, dim, 4, torch.float32, num_heads=3, interleaved=interleaved)
    args = list(case.make(device)[0])
    used = torch.zeros(case.max_position, 1, dtype=torch.bool, device=device)
    used[args[5]] = True
    for index in (3, 4):
        wide = args[index].new_full((case.max_position + 2, dim // 2 + 4), torch.nan)
        rows = wide[1:-1, : dim // 2]
        rows.copy_(args[index].where(used, torch.nan))
        args[index] = rows
    out = rope_kv_append(*args, interleaved=interleaved)
    assert out.isfinite().all()
    assert_equal(out, rotate_ref(args[0], *args[3:6], interleaved=interleaved))


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    k_cache, v_cache = (
        memory.as_strided((2, 1, 1, 32), (2**31, 32, 32, 1), offset) for offset in (0, 32)
    )
    q, k, v = (
        hostile.normal(1, 1, 32, dtype=torch.bfloat16, device=device, seed=s) for s in range(3)
    )
    one = torch.tensor([1], device=device)
    tables = rotary_tables(2, 32, device)
    rope_kv_append(q, k, v, *tables, one, k_cache, v_cache, one)
    assert_equal(k_cache[1, 0], rotate_ref(k, *tables, one)[0])
    assert_equal(v_cache[1, 0], v[0])


def test_the_number_of_threads_changes_nothing() -> None:
    case = RopeKvAppendCase(300, 2, 64, num_heads=8, kv_dtype="int8")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        check(case.make("cpu")[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", -1, r"positions\[5\] must be in \[0, MAXPOS\) = \[0, 50\), got -1$"),
        ("positions", 50, r"positions\[5\] must be in \[0, MAXPOS\) = \[0, 50\), got 50$"),
        ("positions", 2**62, r"positions\[5\] must be in .* got 4611686018427387904$"),
        ("slot_mapping", -2, r"slot_mapping\[5\] must be -1 or in \[0, NP \* P\) = .* got -2$"),
        ("slot_mapping", 16, r"slot_mapping\[5\] must be -1 or in .* = \[0, 16\), got 16$"),
    ],
)
def test_data_out_of_range_raises_before_anything_is_written(
    name: str, value: int, message: str
) -> None:
    args = list(CASE.make("cpu")[0])
    args[NAMES.index(name)][5] = value
    if name == "positions":
        args[8][5] = -1  # also where the token has no slot
    with pytest.raises(RuntimeError, match=f"effllm::rope_kv_append: {message}"):
        rope_kv_append(*args)
    assert args[6].isnan().all()
    assert args[7].isnan().all()


@pytest.mark.gpu
@pytest.mark.sanitizer
@both_pairings
@pytest.mark.parametrize("kv_dtype", [None, "e4m3", "int4"])
@pytest.mark.parametrize("dim", [6, 64])
def test_data_out_of_range_on_the_gpu(dim: int, kv_dtype: str | None, interleaved: bool) -> None:
    """Slots are skipped; of wild positions nothing is read, and what they would rotate is NaN."""
    case = RopeKvAppendCase(
        9, 2, dim, 4, rotary_dim=dim // 4 * 2, skip_every=None, kv_dtype=kv_dtype
    )
    args, _ = case.make("cuda")
    sane = [tensor.clone() for tensor in args]
    num_slots = args[6].shape[0] * args[6].shape[1]
    args[8][1], args[8][2] = num_slots, -(2**63)
    sane[8][1], sane[8][2] = -1, -1
    args[5][3], args[5][4] = case.max_position, -(2**63)
    for index in (3, 4):  # a row of NaN in the place of each wild position
        sane[index] = torch.cat([sane[index], sane[index][:1] * torch.nan])
    sane[5][3:5] = case.max_position
    expected = rope_kv_append_ref(*sane, interleaved=interleaved)
    out = rope_kv_append(*args, interleaved=interleaved)
    for found, wanted in zip((*args[6:8], *args[9:], out), expected, strict=True):
        assert_equal(as_bits(found), as_bits(wanted))
    assert out[3:5, :, : dim // 4 * 2].isnan().all()


@pytest.mark.gpu
def test_first_call_in_a_cuda_graph_and_replay_with_other_data() -> None:
    args, _ = CASE.make("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rope_kv_append(*args)
    args[8].copy_(torch.arange(7).flip(0))
    args[5].copy_(torch.arange(40, 47))
    args[1].copy_(args[1] + 1)
    expected = rope_kv_append_ref(*args)
    graph.replay()
    for found, wanted in zip((*args[6:8], out), expected, strict=True):
        assert_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("name", ["q", "k", "v", "cos", "sin"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_backward_pass_raises(backend: str | None, name: str) -> None:
    """torch would answer with a warning, and no gradient."""
    args, _ = RopeKvAppendCase(5, dtype=torch.float32).make("cpu")
    args[NAMES.index(name)].requires_grad_()
    torch._dynamo.reset()
    function = torch.compile(rope_kv_append, backend=backend) if backend else rope_kv_append
    out = function(*args)
    with pytest.raises(RuntimeError, match="rope_kv_append is an inference op without a gradient"):
        out.sum().backward()
    with torch.inference_mode():
        assert_equal(function(*args), rope_kv_append_ref(*args)[-1])


HALF = torch.float16
ERRORS = [
    ("q", torch.ones(7, 3, 64, dtype=torch.int32), "q must be float16, bfloat16 or float32, got"),
    ("q", torch.ones(7, 192, dtype=HALF), r"q must be \[T, HQ, D\] = .*, got \[7, 192\]"),
    (
        "q",
        torch.ones(7, 64, 3, dtype=HALF).transpose(1, 2),
        r"q must have stride 1 in its last dimension, got strides \[192, 1, 3\]",
    ),
    ("k", torch.ones(7, 2, 64), "k must be float16, got float32"),
    (
        "k",
        torch.ones(6, 2, 64, dtype=HALF),
        r"k must be \[T, HKV, D\] = \[7, \?, 64\], got \[6, 2, 64\]",
    ),
    (
        "k",
        torch.ones(7, 2, 32, dtype=HALF),
        r"k must be \[T, HKV, D\] = \[7, 2, 64\], got \[7, 2, 32\]",
    ),
    ("v", torch.ones(7, 2, 64), "v must be float16, got float32"),
    (
        "v",
        torch.ones(7, 1, 64, dtype=HALF),
        r"v must be \[T, HKV, D\] = \[7, 2, 64\], got \[7, 1, 64\]",
    ),
    ("cos", torch.ones(50, 16, dtype=HALF), "cos must be float32, got float16"),
    ("cos", torch.ones(50), r"cos must be \[MAXPOS, R/2\] = .*, got \[50\]"),
    (
        "cos",
        torch.ones(16, 50).t(),
        r"cos must have stride 1 in its last dimension, got strides \[1, 50\]",
    ),
    ("sin", torch.ones(50, 16, dtype=torch.float64), "sin must be float32, got another dtype"),
    (
        "sin",
        torch.ones(49, 16),
        r"sin must be \[MAXPOS, R/2\] = \[50, 16\], got \[49, 16\]",
    ),
    (
        "sin",
        torch.ones(50, 32)[:, ::2],
        r"sin must have stride 1 in its last dimension, got strides \[32, 2\]",
    ),
    ("positions", torch.ones(7, dtype=torch.int32), "positions must be int64, got int32"),
    (
        "positions",
        torch.ones(8, dtype=torch.int64),
        r"positions must be \[T\] = \[7\], got \[8\]",
    ),
    (
        "positions",
        torch.ones(14, dtype=torch.int64)[::2],
        r"positions must have stride 1 in its last dimension, got strides \[2\]",
    ),
    (
        "k_cache",
        torch.ones(4, 4, 2, 64, dtype=torch.bfloat16),
        "k_cache must be float16, float8_e4m3fn, int8 or uint8, got bfloat16",
    ),
    (
        "v_cache",
        torch.ones(5, 4, 2, 64, dtype=HALF),
        r"v_cache must be \[NP, P, HKV, D\] = \[4, 4, 2, 64\], got \[5, 4, 2, 64\]",
    ),
    ("slot_mapping", torch.ones(7, dtype=torch.int32), "slot_mapping must be int64, got int32"),
    ("k_scale", torch.ones(4, 4, 2), "k_scale must be None for a cache of float16, got a tensor"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), ERRORS)
def test_errors(name: str, tensor: Tensor, message: str, device: str) -> None:
    args = dict(zip(NAMES, CASE.make(device)[0], strict=False))
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    args[name] = moved.copy_(tensor)
    with pytest.raises(RuntimeError, match=f"effllm::rope_kv_append: {message}"):
        rope_kv_append(**args)


def test_tables_wider_than_a_head_are_a_named_error(device: str) -> None:
    args = dict(zip(NAMES, CASE.make(device)[0], strict=False))
    args["cos"] = args["sin"] = torch.ones(50, 33, device=device)
    message = r"cos and sin must have at most D / 2 = 32 columns, got 33"
    with pytest.raises(RuntimeError, match=f"effllm::rope_kv_append: {message}"):
        rope_kv_append(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES[:9])
def test_mixed_devices_are_a_named_error(name: str) -> None:
    args = dict(zip(NAMES, CASE.make("cuda")[0], strict=False))
    args[name] = args[name].cpu()
    with pytest.raises(RuntimeError, match=r"must be on (cpu|cuda:0) as q is, got (cpu|cuda:0)"):
        rope_kv_append(**args)
