"""`python -m effllm quantize MODEL ...` and `python -m effllm eval DIR ...`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import effllm
from effllm import demo, quantization
from effllm.cli import main
from effllm.evaluation import score_text
from effllm.nn import Int4Linear, Lut4Linear
from effllm.nn.quantized_linear import QuantizedLinear
from effllm.quantization.gguf_blocks import GgufType

pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

MODEL = str(demo.draft_path())


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of code that the model can read."""
    path = tmp_path / "text.py"
    path.write_text(demo.held_out_text()[:20_000])
    return str(path)


@pytest.mark.parametrize(
    ("method", "options", "format"),
    [
        ("awq", ["--bits", "4", "--group", "128"], "compressed-tensors"),
        ("gptq", ["--bits", "3", "--group", "64", "--no-symmetric", "--clip"], "gptq_v2"),
        ("linear", ["--group", "-1", "--symmetric"], "compressed-tensors"),
    ],
)
def test_quantize_and_eval(
    method: str,
    options: list[str],
    format: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The checkpoint holds what quantize_ makes of the model, and its tokenizer."""
    out = tmp_path / "out"
    calibration = ["--calibration", text, "--calibration-tokens", "1024", "--context", "256"]
    more = [] if method == "linear" else calibration
    command = ["quantize", MODEL, "--method", method, *options, *more]
    assert main([*command, "--format", format, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"model.layers.0.self_attn.q_proj  {method:<8}" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"text.py", "out"}

    model, tokenizer = demo.load(demo.draft_path())
    ids = torch.tensor(tokenizer(Path(text).read_text(), verbose=False).input_ids)
    count = len(ids) // 256
    rows = ids[: 256 * count].view(-1, 256)[torch.linspace(0, count - 1, 4).round().long()]
    config = {
        "awq": quantization.AwqConfig(4, quantization.Granularity.group(128)),
        "gptq": quantization.GptqConfig(3, quantization.Granularity.group(64), False, True),
        "linear": effllm.Int4Config(-1),
    }[method]
    data = None if method == "linear" else rows
    effllm.quantize_(
        model, config, lambda module, name: name != "lm_head", calibration=data, progress=False
    )
    loaded = effllm.load(out, progress=False, attn_implementation="effllm")
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            assert torch.equal(module.weight, loaded.get_submodule(name).weight), name

    assert main(["eval", str(out), "--text", text, "--context", "512", "--limit", "1500"]) == 0
    printed = capsys.readouterr().out
    expected = score_text(loaded, ids[:1500], context=512)
    found = re.fullmatch(
        r"perplexity (\S+) over 1499 tokens \(context 512, stride 256\), (\S+) tokens/s\n", printed
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(expected.perplexity, rel=1e-3)
    assert float(found[2]) > 0


CHANNEL, TENSOR = quantization.Granularity.channel(), quantization.Granularity.tensor()


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], quantization.Fp8Config()),
        (
            ["--scales", "block"],
            quantization.Fp8Config(
                quantization.Granularity.block(128, 128), quantization.Granularity.group(128)
            ),
        ),
        (["--scales", "channel", "--inputs", "wide"], quantization.Fp8Config(CHANNEL, None)),
        (["--scales", "tensor"], quantization.Fp8Config(TENSOR, TENSOR)),
        (["--inputs", "static"], quantization.Fp8Config(CHANNEL, TENSOR, static=True)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fp8(options: list[str], config: quantization.Fp8Config, text: str, tmp_path: Path) -> None:
    assert_checkpoint_is_quantised(["fp8", *options], config, text, tmp_path)


def assert_checkpoint_is_quantised(
    options: list[str], config: quantization.Method, text: str, tmp_path: Path
) -> None:
    """It holds what quantize_ makes of the model, inputs included."""
    out = tmp_path / "out"
    calibration = ["--calibration", text, "--calibration-tokens", "512", "--context", "256"]
    more = calibration if config.needs_calibration else []
    assert main(["quantize", MODEL, "--method", *options, *more, "--out", str(out)]) == 0
    model, tokenizer = demo.load(demo.draft_path())
    ids = torch.tensor(tokenizer(Path(text).read_text(), verbose=False).input_ids)
    count = len(ids) // 256
    effllm.quantize_(
        model,
        config,
        lambda module, name: name != "lm_head",
        calibration=ids[: 256 * count].view(-1, 256)[[0, count - 1]] if more else None,
        progress=False,
    )
    loaded = effllm.load(out, progress=False)
    assert repr(loaded.model.layers) == repr(model.model.layers)
    with torch.no_grad():
        assert torch.equal(loaded(ids[None, :64]).logits, model(ids[None, :64]).logits)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["int8"], quantization.Int8Config()),
        (["int8", "--scales", "tensor"], quantization.Int8Config(TENSOR)),
        (["int8", "--inputs", "static"], quantization.Int8Config(CHANNEL, TENSOR, static=True)),
        (["smoothquant"], quantization.SmoothQuantConfig()),
        (
            ["linear", "--bits", "8"],
            quantization.LinearConfig(8, quantization.Granularity.group(128)),
        ),
        (["gptq", "--bits", "8", "--group", "-1"], quantization.GptqConfig(8, CHANNEL)),
        (
            ["smoothquant", "--alpha", "0.5", "--inputs", "static"],
            quantization.SmoothQuantConfig(CHANNEL, TENSOR, static=True, alpha=0.5),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eight_bits(
    options: list[str], config: quantization.Method, text: str, tmp_path: Path
) -> None:
    assert_checkpoint_is_quantised(options, config, text, tmp_path)


@pytest.mark.parametrize("weighted", [False, True])
def test_codebooks_as_dense_weights(weighted: bool, text: str, tmp_path: Path) -> None:
    """No format holds codebooks by k-means: the checkpoint has what they stand for."""
    out = tmp_path / "out"
    calibration = ["--calibration", text, "--calibration-tokens", "512", "--context", "256"]
    more = ["--weighted", *calibration] if weighted else []
    command = ["quantize", MODEL, "--method", "kmeans", "--bits", "3", "--group", "64", *more]
    assert main([*command, "--out", str(out)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"text.py", "out"}

    model, tokenizer = demo.load(demo.draft_path())
    ids = torch.tensor(tokenizer(Path(text).read_text(), verbose=False).input_ids)
    count = len(ids) // 256
    rows = ids[: 256 * count].view(-1, 256)[[0, count - 1]]
    effllm.quantize_(
        model,
        quantization.KMeansConfig(3, quantization.Granularity.group(64), weighted),
        lambda module, name: name != "lm_head",
        calibration=rows if weighted else None,
        progress=False,
    )
    loaded, _ = demo.load(out)
    for name, module in model.named_modules():
        if isinstance(module, Lut4Linear):
            assert torch.equal(module.weight, loaded.get_submodule(name).weight), name
    assert main(["eval", str(out), "--text", text, "--context", "256", "--limit", "600"]) == 0


@pytest.mark.parametrize("tensor_type", get_args(GgufType))
def test_gguf_files(tensor_type: GgufType, text: str, tmp_path: Path) -> None:
    """One file that holds the layers as they are."""
    out = tmp_path / "out.gguf"
    command = ["quantize", MODEL, "--method", "gguf", "--format", f"gguf-{tensor_type}"]
    assert main([*command, "--out", str(out)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"text.py", "out.gguf"}
    model, _ = demo.load(demo.draft_path())
    effllm.quantize_(model, quantization.GgufConfig(tensor_type), progress=False)
    loaded = effllm.load(out, progress=False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 21  # the head is tied to the embedding
    for name, layer in layers.items():
        found = loaded.get_submodule(name)
        assert type(found) is type(layer)
        assert torch.equal(found.weight.to(torch.float32), layer.weight.to(torch.float32)), name
    assert main([*command, "--out", str(out)]) == 1


def test_bits_on_average(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layers have what choose_configs gives them."""
    out = tmp_path / "out"
    command = ["quantize", MODEL, "--method", "linear", "--average-bits", "3", "--group", "64"]
    command += ["--calibration", text, "--calibration-tokens", "512", "--context", "256"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    model, _ = demo.load(demo.draft_path())
    sizes = {n: m.weight.numel() for n, m in model.named_modules() if type(m) is nn.Linear}
    bits = {
        name: int(found[1])
        for name in sizes
        if (found := re.search(rf"^{re.escape(name)} +linear +(\d) ", printed, re.MULTILINE))
    }
    assert bits.keys() == sizes.keys() - {"lm_head"}
    assert len(set(bits.values())) > 1
    total = sum(sizes[name] for name in bits)
    assert 2.9 < sum(bits[name] * sizes[name] for name in bits) / total <= 3
    assert isinstance(
        effllm.load(out, progress=False).get_submodule("model.layers.0.mlp.up_proj"), Int4Linear
    )


def test_an_interrupted_command_goes_on(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["quantize", MODEL, "--method", "gptq", "--calibration", text, "--out", str(out)]
    command += ["--calibration-tokens", "512", "--context", "256", "--group", "64"]
    quantise = quantization.GptqConfig.quantise
    calls: list[str] = []

    def counted(self: quantization.GptqConfig, *args: object) -> object:
        calls.append("")
        if len(calls) == 10:
            raise KeyboardInterrupt
        return quantise(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(quantization.GptqConfig, "quantise", counted)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert not out.exists()
    assert main(command) == 0
    # The block of the first seven layers was done.
    assert len(calls) == 10 + 14
    assert json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gptq"], "--method gptq needs --calibration FILE"),
        (["--method", "linear", "--group", "48"], r"n in \(32, 64, 128\), got group\(48\)"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (
            ["--method", "kmeans", "--format", "awq"],
            "--format awq does not hold what --method kmeans makes; use dense",
        ),
        (["--method", "gptq", "--format", "gguf-q4_0"], "--format gguf-q4_0 does not hold what"),
        (["--method", "gguf", "--bits", "4"], "--method gguf has no --bits"),
        (["--method", "gguf", "--group", "32"], "--method gguf has no --group"),
        (["--method", "kmeans", "--weighted"], "--method kmeans --weighted needs --calibration"),
        (["--method", "kmeans", "--clip"], "--method kmeans has no --clip"),
        (["--method", "kmeans", "--no-symmetric"], "--method kmeans has no --symmetric"),
        (["--method", "gptq", "--weighted"], "--method gptq has no --weighted"),
        (["--method", "fp8", "--bits", "4"], "--method fp8 has no --bits"),
        (["--method", "int8", "--alpha", "0.5"], "--method int8 has no --alpha"),
        (["--method", "int8", "--scales", "block"], r"Int8Config: granularity must be tensor\(\)"),
        (["--method", "int8", "--inputs", "wide"], r"inputs must be .*, got None"),
        (["--method", "smoothquant"], "--method smoothquant needs --calibration FILE"),
        (
            ["--method", "smoothquant", "--alpha", "2", "--calibration", "TEXT"],
            r"alpha must be in 0\.\.1, got 2",
        ),
        (["--method", "linear", "--scales", "block"], "--method linear has no --scales"),
        (
            ["--method", "fp8", "--inputs", "static", "--scales", "tensor"],
            "--method fp8 --inputs static needs --calibration FILE",
        ),
        (
            ["--method", "linear", "--bits", "8", "--format", "awq"],
            "--format awq does not hold what --method linear makes of 8 bits; use",
        ),
        (["--method", "kmeans", "--bits", "8"], "KMeansConfig: bits must be 2, 3 or 4, got 8"),
        (["--method", "fp8", "--format", "awq"], "--format awq does not hold what --method fp8"),
        (["--method", "linear", "--average-bits", "3"], "--average-bits needs --calibration FILE"),
        (["--average-bits", "3", "--bits", "4"], "without --bits, got 3 and --bits 4"),
        (["--method", "linear", "--device", "cuda:99"], "device 'cuda:99' cannot be used: "),
        (["--average-bits", "5"], r"--average-bits must be in 2\.\.4"),
        (["--calibration", "TEXT", "--context", "100000"], "must hold at least 100000 tokens, got"),
    ],
)
def test_errors(
    arguments: list[str], message: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    assert main(["quantize", MODEL, *arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.match(f"effllm quantize: .*{message}", error)
    assert error.count("\n") == 1
    assert main(["quantize", MODEL, "--method", "linear", "--out", str(tmp_path)]) == 1
    assert "exists and is no empty folder" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "none"), "--text", text]) == 1
    assert capsys.readouterr().err.startswith("effllm eval: ")
