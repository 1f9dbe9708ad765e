"""effllm.load: every format with every option, against the dense model that it stands for."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_zoo import Written, Zoo, edit_config, write_checkpoint, write_config, write_tensors
from safetensors.torch import load_file
from tiny_models import IDS, logits
from torch import nn

import effllm
from effllm.formats import inspect
from effllm.nn import Int4Linear


def zoo() -> list[Zoo]:
    """Formats x scale dtypes x bias x tied head x odd N and K where legal, and the odd ones."""
    even = [
        Zoo("awq"),  # packs 8 output channels to a word, in whole groups
        Zoo("pack-quantized", symmetric=True),  # groups are whole too
        Zoo("pack-quantized"),
    ]
    any_size = [
        Zoo("gptq", symmetric=True),
        Zoo("gptq"),
        Zoo("gptq_v2", shuffled=True),
        Zoo("gptq_v2", bits=2),
        Zoo("gptq", bits=3, symmetric=True),
        Zoo("gptq_v2", bits=8),
        Zoo("pack-quantized", group_size=-1),
    ]
    sizes = [(kind, 96) for kind in (*even, *any_size)] + [(kind, 91) for kind in any_size]
    options = itertools.product(
        sizes, (torch.float16, torch.bfloat16), (False, True), (False, True)
    )
    every = [
        replace(kind, intermediate=size, dtype=dtype, bias=bias, tied=tied)
        for (kind, size), dtype, bias, tied in options
    ]
    return [
        *every,
        Zoo("awq", group_size=-1),
        Zoo("awq", group_size=16),  # dense
        Zoo("awq", head=True, tied=True),
        Zoo("gptq", group_size=-1, symmetric=True),
        Zoo("gptq_v2", bits=3, shuffled=True, shards=3),
        Zoo("gptq_v2", bits=2, group_size=64, shuffled=True),
        Zoo("gptq", bits=8, symmetric=True, shuffled=True),
        Zoo("pack-quantized", group_size=-1, symmetric=True, intermediate=91),
        Zoo("pack-quantized", shuffled=True),
        Zoo("pack-quantized", bits=2),
        Zoo("pack-quantized", bits=3, symmetric=True),
        Zoo("pack-quantized", bits=8),
        Zoo("pack-quantized", head=True, shards=2),
    ]


@pytest.mark.parametrize("kind", zoo(), ids=lambda kind: kind.id)
def test_loads_what_was_stored(kind: Zoo, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, kind)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    assert not model.training
    for name, weight in written.weights.items():
        module = model.get_submodule(name)
        dense = kind.bits == 8 or kind.group_size == 16
        assert type(module) is (nn.Linear if dense else Int4Linear), name
        # fp32 holds the product of a scale and a difference of codes exactly.
        found = module.weight if dense else module_weight(module)
        assert torch.equal(found.double(), weight.dense), name
        if not dense:
            assert module.scales.dtype == kind.dtype
            assert (module.perm is not None) == (
                kind.shuffled and kind.group_size < module.in_features
            )
    for name, parameter in written.dense.named_parameters():
        if name.removesuffix(".weight") not in written.weights:
            assert torch.equal(model.get_parameter(name), parameter), name
    tied = kind.tied and not kind.head
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(model), logits(written.dense), rtol=1e-4, atol=1e-4)


def module_weight(module: Int4Linear) -> torch.Tensor:
    """In fp32, where the property rounds to the dtype of the scales."""
    wide = copy.deepcopy(module)
    wide.scales.data = wide.scales.data.float()
    return wide.weight


def rows(written: Written) -> dict[str, tuple[str, int, int | None, str]]:
    report = inspect(written.folder)
    return {row.name: (row.format, row.bits, row.group_size, row.kernel) for row in report.layers}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Zoo("awq"), ("awq", 4, 32, "int4_gemm")),
        (Zoo("gptq", bits=3), ("gptq", 3, 32, "int4_gemm")),
        (Zoo("gptq_v2", shuffled=True), ("gptq_v2", 4, 32, "int4_gemm, inputs permuted")),
        (Zoo("pack-quantized", bits=8), ("pack-quantized", 8, 32, "dense (8-bit codes)")),
        (Zoo("awq", group_size=16), ("awq", 4, 16, "dense (groups of 16)")),
        (Zoo("pack-quantized", group_size=-1), ("pack-quantized", 4, 64, "int4_gemm")),
    ],
    ids=lambda value: value.id if isinstance(value, Zoo) else "",
)
def test_reports(kind: Zoo, expected: tuple[str, int, int, str], tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, kind)
    name = "model.layers.1.self_attn.q_proj"
    assert rows(written)[name] == expected
    assert rows(written)["lm_head"] == ("f16", 16, None, "dense")
    on_disk = inspect(tmp_path)
    assert on_disk.bytes == sum(tensor.nbytes for tensor in written.tensors.values())
    text = str(on_disk).splitlines()
    assert text[0].split() == ["layer", "format", "bits", "group", "kernel", "bytes"]
    assert text[-1].split() == ["total", f"{on_disk.bytes:,}"]

    model = effllm.load(tmp_path, progress=False)
    loaded = {row.name: row for row in model.effllm_report.layers}
    row = loaded[name]
    assert (row.format, row.bits, row.group_size, row.kernel) == expected
    assert row.bytes == sum(p.nbytes for p in model.get_submodule(name).parameters())
    assert loaded["lm_head"].bytes == 72 * 64 * 2
    memory = [*model.parameters(), *model.buffers()]
    assert model.effllm_report.bytes == sum(tensor.nbytes for tensor in memory)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind",
    [Zoo("awq"), Zoo("gptq", bits=3, shuffled=True), Zoo("pack-quantized", bits=8, tied=True)],
    ids=lambda kind: kind.id,
)
def test_the_gpu_decodes_as_the_cpu(kind: Zoo, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kind)
    host = effllm.load(tmp_path, progress=False)
    device = effllm.load(tmp_path, device="cuda", progress=False)
    found = device.state_dict()
    for name, tensor in host.state_dict().items():
        assert found[name].is_cuda, name
        assert torch.equal(found[name].cpu(), tensor), name
    assert all(buffer.is_cuda for buffer in device.buffers())
    torch.testing.assert_close(device(IDS.cuda()).logits.cpu(), logits(host), rtol=0.05, atol=0.05)


def test_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "a", Zoo("awq"))
    model = effllm.load(tmp_path / "a", progress=False)
    effllm.save(model, tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""
    model = effllm.load(tmp_path / "a")
    assert "load:   0%|" in capsys.readouterr().err
    effllm.save(model, tmp_path / "c")
    assert "save:   0%|" in capsys.readouterr().err


def test_generates_over_pages(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Zoo("awq"))
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False, attn_implementation="effllm")
    (result,) = effllm.generate(model, [[1, 5, 9]], max_new_tokens=4)
    assert len(result.tokens) == 4


def test_unquantised_checkpoints_load_as_they_are(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    model = effllm.load(tmp_path, progress=False)
    assert torch.equal(logits(model), logits(llama))
    row = next(row for row in model.effllm_report.layers if row.name == "lm_head")
    assert (row.format, row.kernel, row.bytes) == ("float32", "dense", 97 * 64 * 4)
    assert effllm.load(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is mis"):
        effllm.load(tmp_path)


# -- what configs say ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_the_words_decide_the_version_of_a_symmetric_file(version: int, tmp_path: Path) -> None:
    stored, declared = ("gptq", "gptq_v2") if version == 1 else ("gptq_v2", "gptq")
    written = write_checkpoint(tmp_path, Zoo(stored, symmetric=True))
    edit_config(tmp_path, checkpoint_format=declared)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    torch.testing.assert_close(logits(model), logits(written.dense), rtol=1e-4, atol=1e-4)


def test_ambiguous_zero_points_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, Zoo("gptq"))  # random zero points, 0 among them
    with caplog.at_level(logging.WARNING):
        effllm.load(tmp_path, progress=False)
    assert "model.layers.0.self_attn.q_proj: GPTQ v1 zero points of 0" in caplog.text


def test_dynamic_overrides(tmp_path: Path) -> None:
    """One layer has other bits and groups, one kind of layer is not quantised."""
    written = write_checkpoint(tmp_path, Zoo("gptq_v2"))
    other = write_checkpoint(tmp_path / "other", Zoo("gptq_v2", bits=3, group_size=64))
    dense = written.dense.state_dict()
    tensors = {
        name: tensor
        for name, tensor in written.tensors.items()
        if "0.mlp.up_proj" not in name and "down_proj" not in name
    }
    up = "model.layers.0.mlp.up_proj"
    tensors |= {name: t for name, t in other.tensors.items() if name.startswith(up)}
    for i in (0, 1):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        tensors[name] = dense[name]
    write_tensors(tmp_path, tensors)
    edit_config(
        tmp_path,
        dynamic={
            r"-:.*\.down_proj": {},
            r"+:model\.layers\.0\.mlp\.up_proj": {"bits": 3, "group_size": 64},
            r".*\.up_proj": {},  # the first match decides
        },
    )
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    layer = model.model.layers[0].mlp.up_proj
    assert layer.group_size == 64
    assert torch.equal(module_weight(layer).double(), other.weights[up].dense)
    assert rows(written)[up] == ("gptq_v2", 3, 64, "int4_gemm")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Zoo("awq"), {"modules_to_not_convert": ["lm_head", "down_proj"]}),
        (Zoo("pack-quantized"), {"ignore": ["lm_head", r"re:.*\.down_proj$"]}),
        (
            Zoo("pack-quantized"),
            {"ignore": ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]},
        ),
    ],
    ids=["awq", "re", "names"],
)
def test_layers_that_are_not_quantised(kind: Zoo, changes: dict[str, Any], tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, kind)
    tensors = {name: t for name, t in written.tensors.items() if "down_proj" not in name}
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"down_proj\..*' is quantised, which disagrees with .*co"):
        effllm.load(tmp_path)
    for i in (0, 1):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        tensors[name] = written.dense.state_dict()[name]
    write_tensors(tmp_path, tensors)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    torch.testing.assert_close(logits(model), logits(written.dense), rtol=1e-4, atol=1e-4)


def test_groups_of_compressed_tensors(tmp_path: Path) -> None:
    """Two groups with their own targets, one scale for all of a weight, unpacked zero points."""
    written = write_checkpoint(tmp_path, Zoo("pack-quantized"))
    name = "model.layers.0.mlp.up_proj"
    tensors = dict(written.tensors)
    del tensors[f"{name}.weight_zero_point"]
    tensors[f"{name}.weight_scale"] = torch.tensor([0.02], dtype=torch.float16)
    other = "model.layers.1.mlp.up_proj"
    tensors[f"{other}.weight_zero_point"] = torch.from_numpy(written.weights[other].z - 8).to(
        torch.int8
    )
    write_tensors(tmp_path, tensors)
    groups = Zoo("pack-quantized").quantization_config()["config_groups"]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "tensor"}
    groups = {"group_1": {"targets": [rf"re:{name}$"], "weights": weights}} | groups
    edit_config(tmp_path, config_groups=groups)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    expected = (torch.from_numpy(written.weights[name].q) - 8) * torch.tensor(0.02).half().float()
    assert torch.equal(module_weight(model.get_submodule(name)), expected)
    found = module_weight(model.get_submodule(other))
    assert torch.equal(found.double(), written.weights[other].dense)


def test_zero_points_that_are_there_count(tmp_path: Path) -> None:
    """Also in a file that calls itself symmetric."""
    written = write_checkpoint(tmp_path, Zoo("pack-quantized"))
    groups = Zoo("pack-quantized", symmetric=True).quantization_config()["config_groups"]
    edit_config(tmp_path, config_groups=groups)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    torch.testing.assert_close(logits(model), logits(written.dense), rtol=1e-4, atol=1e-4)


def test_older_config_files(tmp_path: Path) -> None:
    for kind, name, config in (
        (
            Zoo("awq"),
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        ),
        (
            Zoo("gptq", symmetric=True),
            "quantize_config.json",
            {"bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        ),
    ):
        folder = tmp_path / kind.format
        written = write_checkpoint(folder, kind)
        write_config(folder, written.dense.config, None, torch.float16)
        (folder / name).write_text(
            repr(config).replace("'", '"').replace("T", "t").replace("F", "f")
        )
        model = effllm.load(folder, dtype=torch.float32, progress=False)
        torch.testing.assert_close(logits(model), logits(written.dense), rtol=1e-4, atol=1e-4)


def test_biases_of_zeros_go(tmp_path: Path) -> None:
    """AutoGPTQ stored a bias for every layer."""
    written = write_checkpoint(tmp_path, Zoo("gptq", symmetric=True))
    biases = {f"{name}.bias": torch.zeros(w.q.shape[0]) for name, w in written.weights.items()}
    other = "model.layers.0.mlp.up_proj"
    biases[f"{other}.bias"] = torch.ones(96)
    write_tensors(tmp_path, written.tensors | biases)
    model = effllm.load(tmp_path, progress=False)
    assert model.model.layers[0].mlp.gate_proj.bias is None
    assert torch.equal(model.get_submodule(other).bias, torch.ones(96, dtype=torch.float16))


def test_tied_heads_that_are_stored_twice(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, Zoo("awq", tied=True))
    embedding = written.tensors["model.embed_tokens.weight"]
    write_tensors(tmp_path, written.tensors | {"lm_head.weight": embedding.clone()})
    model = effllm.load(tmp_path, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    write_tensors(tmp_path, written.tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight, lm_head\.weight must be equal"):
        effllm.load(tmp_path, progress=False)
