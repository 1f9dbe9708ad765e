"""GgufConfig: the best scales of each block, and codes that GGUF files hold as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IDS, llama_config
from torch import Tensor, nn

import effllm
from effllm import demo
from effllm.formats.gguf import GgufFile, TensorType
from effllm.formats.gguf.blocks import dequantize, from_int4, quantize
from effllm.nn import GgufLinear, Int4Linear
from effllm.nn.gguf_linear import LAYOUTS, BlockType
from effllm.nn.quantized_linear import QuantizedLinear
from effllm.quantization import GgufConfig, LinearConfig, dequantize_
from effllm.quantization.gguf_blocks import GgufType
from effllm.quantization.method import GgufCodes
from effllm.quantization.statistics import InputStatistics

TYPES: list[GgufType] = ["q4_0", "q4_1"]
BLOCK_KINDS: list[BlockType] = list(LAYOUTS)
STORED = {"q4_0": TensorType.Q4_0, "q4_1": TensorType.Q4_1}


def weight(n: int = 24, k: int = 128) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k) * torch.randn(n, 1).exp() * 0.02 + torch.randn(n, 1) * 0.01


def error(dense: Tensor, exact: Tensor, mass: Tensor | float = 1.0) -> float:
    return float(((dense - exact).double().square() * mass).sum())


def best_error(block: Tensor, zeros: range, scales: Tensor) -> float:
    """The least squared error of a block ``[32]`` over all zero points and many scales."""
    found = []
    for zero in zeros:
        codes = (torch.round(block / scales[:, None]) + zero).clamp(0, 15)
        dense = (codes - zero) * scales[:, None]
        found.append(float((dense - block).double().square().sum(-1).min()))
    return min(found)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_scales_are_nearly_the_best(tensor_type: GgufType) -> None:
    """Beside a search over 2,000 scales, and every zero point, of each block."""
    exact = weight(6, 64)
    dense = GgufConfig(tensor_type).quantise(exact, None).dense()
    ours, best = 0.0, 0.0
    for row, decoded in zip(exact.view(-1, 32), dense.view(-1, 32), strict=True):
        grid = torch.linspace(0.01, 0.16, 1000) * float(row.abs().max())
        signed = torch.cat([grid, -grid])
        zeros, scales = (range(8, 9), signed) if tensor_type == "q4_0" else (range(16), grid)
        ours += error(decoded, row)
        best += best_error(row, zeros, scales)
    assert 0.99 * best < ours < 1.02 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_files_hold_the_codes_exactly(tensor_type: GgufType, dtype: torch.dtype) -> None:
    exact = weight().to(dtype)
    found = GgufConfig(tensor_type).quantise(exact, None)
    assert found.scales.dtype == torch.float16
    assert found.group_size == 32
    assert (found.zeros is None) == (tensor_type == "q4_0")
    raw = from_int4(found.codes, found.scales, found.zeros)
    assert torch.equal(dequantize(raw, STORED[tensor_type], tuple(exact.shape)), found.dense())


@pytest.mark.parametrize("tensor_type", TYPES)
def test_better_than_rounding(tensor_type: GgufType) -> None:
    """Than ggml rounds, and than ranges that are only cut."""
    exact = weight(64, 256)
    ours = error(GgufConfig(tensor_type).quantise(exact, None).dense(), exact)
    raw = quantize(exact, STORED[tensor_type])
    assert ours < 0.99 * error(dequantize(raw, STORED[tensor_type], tuple(exact.shape)), exact)
    config = LinearConfig(4, GgufConfig(tensor_type).granularity, tensor_type == "q4_0", clip=True)
    assert ours < 0.995 * error(config.quantise(exact, None).dense(), exact)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_inputs_decide_which_errors_count(tensor_type: GgufType) -> None:
    exact = weight()
    x = torch.randn(200, 128) * torch.randn(128).mul(1.5).exp()
    inputs = InputStatistics(128, dtype=torch.float64)
    none = GgufConfig(tensor_type).quantise(exact, inputs).dense()
    inputs.add(x)
    plain = GgufConfig(tensor_type).quantise(exact, None).dense()
    weighted = GgufConfig(tensor_type).quantise(exact, inputs).dense()
    mass = x.double().square().sum(0)
    assert error(weighted, exact, mass) < 0.9 * error(plain, exact, mass)
    assert error(plain, exact) < error(weighted, exact)
    assert torch.equal(none, plain)


@pytest.mark.parametrize("tensor_type", TYPES)
@pytest.mark.parametrize("kind", ["zero", "a zero block", "tiny", "one sign", "equal", "short"])
def test_blocks_that_break_scales(kind: str, tensor_type: GgufType) -> None:
    exact = weight(4, 96)
    if kind == "zero":
        exact.zero_()
    elif kind == "a zero block":
        exact[1, 32:64] = 0
    elif kind == "tiny":
        exact *= 1e-9  # below the smallest number of fp16
    elif kind == "one sign":
        exact = exact.abs() + 1
    elif kind == "equal":
        exact.fill_(-0.3)
    else:
        exact = exact[:, :40]
    found = GgufConfig(tensor_type).quantise(exact, None)
    dense = found.dense()
    assert torch.isfinite(dense).all()
    assert not dense[exact == 0].any()
    assert error(dense, exact) <= error(torch.zeros_like(exact), exact)
    if kind == "equal":
        torch.testing.assert_close(dense, exact, rtol=1e-2, atol=0)
    if kind != "short":  # the format has none
        raw = from_int4(found.codes, found.scales, found.zeros)
        assert torch.equal(dequantize(raw, STORED[tensor_type], tuple(exact.shape)), dense)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_a_model_there_and_back(tensor_type: GgufType, llama: Any, tmp_path: Path) -> None:
    """The file's head is of the same type, so it is quantised too."""
    effllm.quantize_(llama, GgufConfig(tensor_type), progress=False)
    assert all(type(m) is not nn.Linear for m in llama.modules())
    path = tmp_path / "model.gguf"
    effllm.save(llama, path, f"gguf-{tensor_type}", progress=False)
    loaded = effllm.load(path, dtype=torch.float32, progress=False)
    for name, layer in llama.named_modules():
        if isinstance(layer, Int4Linear):
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight), name


def blocks_of(exact: Tensor, tensor_type: GgufType, inputs: Any = None) -> GgufCodes:
    found = GgufConfig(tensor_type).quantise(exact, inputs)
    assert isinstance(found, GgufCodes)
    return found


@pytest.mark.parametrize("tensor_type", BLOCK_KINDS)
def test_inputs_decide_which_errors_of_blocks_count(tensor_type: BlockType) -> None:
    exact = weight(40, 512)
    inputs = InputStatistics(512, dtype=torch.float64)
    none = blocks_of(exact, tensor_type, inputs).dense()
    x = torch.randn(600, 512) * torch.randn(512).mul(1.5).exp()
    x[:, 100:300] = 0  # channels that nothing reaches
    inputs.add(x)
    plain = blocks_of(exact, tensor_type).dense()
    weighted = blocks_of(exact, tensor_type, inputs).dense()
    assert error(weighted, exact, inputs.diagonal) < 0.9 * error(plain, exact, inputs.diagonal)
    assert error(plain, exact) < error(weighted, exact)
    assert torch.equal(none, plain)
    # Where nothing counts for the output, all weights still count alike.
    assert error(weighted[:, 100:256], exact[:, 100:256]) < 0.1 * error(
        torch.zeros(40, 156), exact[:, 100:256]
    )


@pytest.mark.parametrize(("tensor_type", "kind"), [("q4_k", "q4_1"), ("q6_k", "q8_0")])
def test_rows_of_no_whole_blocks_fall_back(tensor_type: GgufType, kind: GgufType) -> None:
    exact = weight(8, 512)[:, :320]
    found, expected = (GgufConfig(t).quantise(exact, None) for t in (tensor_type, kind))
    assert type(found) is type(expected)
    assert torch.equal(found.dense(), expected.dense())


@pytest.fixture
def wide() -> Any:
    """Rows of 256, but 320 into ``down_proj``."""
    config = llama_config(hidden_size=256, intermediate_size=320, head_dim=64, num_hidden_layers=1)
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tensor_type", BLOCK_KINDS)
def test_a_model_of_blocks_there_and_back(
    tensor_type: BlockType, wide: Any, tmp_path: Path
) -> None:
    report = effllm.quantize_(wide, GgufConfig(tensor_type), progress=False)
    bits = {"q8_0": 8, "q4_k": 4, "q6_k": 6}[tensor_type]
    down = "model.layers.0.mlp.down_proj"
    for row in report.layers:
        assert row.bits == (8 if tensor_type == "q6_k" and row.name == down else bits)
    path = tmp_path / "a.gguf"
    effllm.save(wide, path, f"gguf-{tensor_type}", progress=False)
    loaded = effllm.load(path, dtype=torch.float32, progress=False)
    kinds = []
    for name, layer in wide.named_modules():
        if isinstance(layer, QuantizedLinear):
            again = loaded.get_submodule(name)
            assert repr(again) == repr(layer)
            for parameter, value in layer.state_dict().items():
                assert torch.equal(again.state_dict()[parameter], value), (name, parameter)
            kinds.append(getattr(layer, "tensor_type", "q4_1"))
    fallback = {"q8_0": "q8_0", "q4_k": "q4_1", "q6_k": "q8_0"}[tensor_type]
    assert kinds == [tensor_type] * 6 + [fallback, tensor_type]
    rows = {row.name: row for row in effllm.formats.inspect(path).layers}
    run = LAYOUTS[tensor_type].run
    query = rows["model.layers.0.self_attn.q_proj"]
    assert (query.format, query.bits, query.group_size) == (tensor_type, bits, run)
    assert (query.kernel, rows[down].kernel) == ("int4_gemm", "int4_gemm")
    assert rows["model.embed_tokens"].kernel == f"dense ({tensor_type.upper()})"
    again = {row.name: row for row in loaded.effllm_report.layers}[query.name]
    assert (again.format, again.kernel) == (query.format, query.kernel)
    # Linear layers are on the kernel, the embedding has the file's values: all is computed alike.
    wide.model.embed_tokens.weight.data = loaded.model.embed_tokens.weight.data
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, wide(IDS).logits)
    effllm.save(loaded, tmp_path / "b.gguf", f"gguf-{tensor_type}", progress=False)
    a, b = GgufFile(path), GgufFile(tmp_path / "b.gguf")
    for name in a.tensors:
        same = torch.equal(a.raw(name), b.raw(name))
        assert same or name == "token_embd.weight", name


def test_a_mixture_as_llama_cpp_makes_it(wide: Any, tmp_path: Path) -> None:
    """Q4_K with values and the head in Q6_K: each layer's type is kept."""
    mixture = {
        "*.v_proj": GgufConfig("q6_k"),
        "lm_head": GgufConfig("q6_k"),
        "*": GgufConfig("q4_k"),
    }
    effllm.quantize_(wide, mixture, progress=False)
    effllm.save(wide, tmp_path / "a.gguf", "gguf-q4_k", progress=False)
    tensors = GgufFile(tmp_path / "a.gguf").tensors
    assert tensors["blk.0.attn_v.weight"].type == tensors["output.weight"].type == TensorType.Q6_K
    assert tensors["blk.0.attn_q.weight"].type == TensorType.Q4_K
    loaded = effllm.load(tmp_path / "a.gguf", dtype=torch.float32, progress=False)
    assert torch.equal(loaded.lm_head.weight, wide.lm_head.weight)
    with pytest.raises(ValueError, match=r"cannot be stored as Q4_0 .* it is a GgufLinear"):
        effllm.save(wide, tmp_path / "b.gguf", "gguf-q4_0", progress=False)
    effllm.save(wide, tmp_path / "c.gguf", "gguf-f32", progress=False)
    floats = effllm.load(tmp_path / "c.gguf", progress=False, dtype=torch.float32)
    assert torch.equal(floats.lm_head.weight, wide.lm_head.weight)
    with pytest.raises(ValueError, match=r"compressed-tensors holds no GgufLinear"):
        effllm.save(wide, tmp_path / "d", progress=False)


def test_layers_can_be_dense_again(wide: Any) -> None:
    effllm.quantize_(
        wide, {"*.q_proj": GgufConfig("q4_k"), "*.up_proj": LinearConfig()}, progress=False
    )
    exact = wide.model.layers[0].self_attn.q_proj.weight
    dequantize_(wide, torch.float32, GgufLinear)
    layer = wide.model.layers[0]
    assert type(layer.self_attn.q_proj) is nn.Linear
    assert torch.equal(layer.self_attn.q_proj.weight, exact)
    assert isinstance(layer.mlp.up_proj, Int4Linear)


def test_an_interrupted_run_keeps_its_blocks(wide: Any, tmp_path: Path) -> None:
    config = GgufConfig("q4_k")
    other = copy.deepcopy(wide)
    for model in (wide, other):  # the second takes what the first has stored
        effllm.quantize_(model, config, calibration=IDS, state=tmp_path, progress=False)
    assert isinstance(other.model.layers[0].mlp.up_proj, GgufLinear)
    for name, value in wide.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_better_types_are_better_on_the_demo_model() -> None:
    """Q6_K before Q4_K before Q4_0 in held-out perplexity, Q8_0 before all in divergence from the
    predictions of the dense model, which is less a matter of luck."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    exact, tokenizer = demo.load()
    held_out = demo.held_out_tokens(tokenizer, context=512, limit=8192)

    def predictions(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(held_out[:4]).logits, -1)

    wanted = predictions(exact.float())
    divergence, found = [], {}
    for tensor_type in ("q8_0", "q6_k", "q4_k", "q4_0"):
        model, _ = demo.load()
        effllm.quantize_(
            model, GgufConfig(tensor_type), lambda module, name: name != "lm_head", progress=False
        )
        dequantize_(model, torch.float32).float()
        divergence.append(float((wanted.exp() * (wanted - predictions(model))).sum(-1).mean()))
        if tensor_type != "q8_0":
            found[tensor_type] = demo.perplexity(model, held_out, batch_size=4)
    assert divergence[0] < 0.3 * divergence[1]
    assert divergence[1] < 0.3 * divergence[2]
    assert divergence[2] < 0.95 * divergence[3]
    assert found["q6_k"] < found["q4_k"] < found["q4_0"], found


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must be one of \('q4_0', .*'q6_k'\), got 'q8'"):
        GgufConfig("q8")  # type: ignore[arg-type]
    for values, message in ((7e4, "beyond the largest of fp16"), (torch.nan, "NaN or infinity")):
        model = nn.Sequential(nn.Linear(64, 64))
        nn.init.constant_(model[0].weight, float(values))
        with pytest.raises(ValueError, match=f"layer '0': .*{message}"):
            effllm.quantize_(model, GgufConfig(), progress=False)
        model = nn.Sequential(nn.Linear(256, 64))
        nn.init.constant_(model[0].weight, float(values))
        for tensor_type in BLOCK_KINDS:
            with pytest.raises(ValueError, match=f"layer '0': .*{message}"):
                effllm.quantize_(model, GgufConfig(tensor_type), progress=False)
    model = nn.Sequential(nn.Linear(40, 64))
    for tensor_type in ("q8_0", "q6_k"):
        with pytest.raises(
            ValueError, match=r"layer '0': q8_0 needs .* multiple of 32 values, got 40"
        ):
            effllm.quantize_(model, GgufConfig(tensor_type), progress=False)
