"""transformers' from_pretrained of quantised checkpoints: the model that effllm.load makes."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_zoo import Zoo, edit_config, write_checkpoint, write_tensors
from tiny_models import logits
from torch import nn

import effllm
from effllm.formats import CheckpointError
from effllm.integrations import use_quantizer
from effllm.nn import Int4Linear

transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

UP = "model.layers.1.mlp.up_proj"

KINDS = [
    Zoo("awq"),
    Zoo("awq", bias=True, tied=True, dtype=torch.bfloat16),
    Zoo("awq", group_size=16),
    Zoo("gptq", symmetric=True),
    Zoo("gptq", intermediate=90, dtype=torch.bfloat16),
    Zoo("gptq_v2", shuffled=True, bias=True, shards=3),
    Zoo("gptq_v2", bits=2, group_size=64, shuffled=True),
    Zoo("gptq_v2", bits=3, tied=True),
    Zoo("gptq", bits=8, symmetric=True, bias=True),
    Zoo("pack-quantized", dtype=torch.bfloat16),
    Zoo("pack-quantized", symmetric=True, bias=True, tied=True),
    Zoo("pack-quantized", group_size=-1, head=True, tied=True),
    Zoo("pack-quantized", bits=3, shuffled=True, shards=2),
    Zoo("pack-quantized", bits=8),
]


@pytest.fixture(autouse=True)
def always() -> Iterator[None]:
    """Whatever is installed here; the choice has tests of its own."""
    use_quantizer("always")
    yield
    use_quantizer("missing")


def from_pretrained(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_the_model_of_load(
    kind: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, kind)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = from_pretrained(tmp_path)
    assert "LOAD REPORT" not in caplog.text  # nothing missing, nothing unexpected
    expected = effllm.load(tmp_path, progress=False)
    assert torch.equal(logits(model), logits(expected))
    assert model.effllm_report == expected.effllm_report
    assert not model.training
    left, right = dict(model.named_parameters()), dict(expected.named_parameters())
    assert left.keys() == right.keys()
    for name, parameter in left.items():
        assert torch.equal(parameter, right[name]), name
        assert parameter.dtype == right[name].dtype, name
        assert parameter.requires_grad == right[name].requires_grad, name
    assert {type(m) for m in model.modules()} == {type(m) for m in expected.modules()}
    assert model.config.tie_word_embeddings == expected.config.tie_word_embeddings


def test_options_reach_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Zoo("gptq_v2"))
    model = from_pretrained(
        tmp_path, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="effllm"
    )
    expected = effllm.load(
        tmp_path, dtype=torch.float32, progress=False, attn_implementation="effllm"
    )
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(logits(model), logits(expected))
    (result,) = effllm.generate(model, [[1, 5, 9]], max_new_tokens=4)
    assert len(result.tokens) == 4
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(body.layers[0].mlp.up_proj) is Int4Linear


def test_a_plain_model_but_for_saving(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", Zoo("gptq_v2", bias=True, dtype=torch.bfloat16))
    model = from_pretrained(tmp_path / "a")
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    with pytest.raises(ValueError, match=r"use effllm\.save\(model, path\)"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    effllm.save(model, tmp_path / "b", progress=False)
    assert torch.equal(logits(from_pretrained(tmp_path / "b")), expected)
    assert model.config.to_dict()["quantization_config"]["quant_method"] == "gptq"
    x = torch.randn(1, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    model(inputs_embeds=x).logits.float().sum().backward()
    assert x.grad is not None


def test_what_is_expanded_is_saved_as_a_dense_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", Zoo("gptq_v2", bits=8))
    model = from_pretrained(tmp_path / "a")
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(from_pretrained(tmp_path / "b")), logits(model))


def test_biases_that_the_model_has_not(tmp_path: Path) -> None:
    """AutoGPTQ's zeros are dropped without a word; others are a bias of the layer."""
    written = write_checkpoint(tmp_path, Zoo("gptq_v2"))
    tensors = written.tensors | {
        "model.layers.0.mlp.up_proj.bias": torch.zeros(96),
        f"{UP}.bias": torch.full((96,), 0.5),
    }
    write_tensors(tmp_path, tensors)
    model = from_pretrained(tmp_path)
    assert model.model.layers[0].mlp.up_proj.bias is None
    assert torch.equal(model.model.layers[1].mlp.up_proj.bias, torch.full((96,), 0.5).half())
    assert torch.equal(logits(model), logits(effllm.load(tmp_path, progress=False)))


# -- files that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.scales": None}, rf"tensor '{UP}\.scales' is missing"),
        ({f"{UP}.qweight": None}, rf"tensor '{UP}\.\w+' is part of a quantised layer, and the te"),
        (
            {f"{UP}.scales": torch.ones(1, 96)},
            rf"'{UP}\.scales' must be F16 or BF16 or F32 \[2, 96\], got F32 \[1, 96\]",
        ),
        ({f"{UP}.scales": torch.full((2, 96), torch.inf)}, rf"'{UP}\.scales' must be finite, got"),
        (
            {f"{UP}.qweight": torch.ones(8, 88).int()},
            rf"'{UP}\.qweight' must be a weight \[N, K\] = \[96, 64\], got one of \[88, 64\]",
        ),
        (
            {f"{UP}.g_idx": torch.full((64,), 2).int()},
            rf"layer '{UP}': g_idx must be in -2\.\.1, got 2\.\.2",
        ),
        (
            {"nowhere.qweight": torch.ones(8, 8).int()},
            "'nowhere' is stored as .* has no such layer",
        ),
        ({"model.layers.0.mlp.act.scales": torch.ones(9)}, r"act\.scales' is part of a quantised"),
    ],
)
def test_the_errors_of_load(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    written = write_checkpoint(tmp_path, Zoo("gptq_v2"))
    tensors = {name: t for name, t in (written.tensors | change).items() if t is not None}
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_tensors_that_are_renamed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Zoo("gptq_v2"))
    with pytest.raises(CheckpointError, match=r"q_proj' has not been loaded, because its tensors"):
        from_pretrained(tmp_path, key_mapping={r"q_proj": "query"})


def test_configs_and_files_that_are_not_read(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, Zoo("awq"))
    edit_config(tmp_path, version="gemv")
    with pytest.raises(CheckpointError, match="AWQ version 'gemv' is not supported"):
        from_pretrained(tmp_path)
    edit_config(tmp_path, version="gemm")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    assert from_pretrained(tmp_path, variant="fp16") is not None
    (tmp_path / "model.fp16.safetensors").unlink()
    torch.save(written.tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"from safetensors files, got pytorch_model\.bin"):
        from_pretrained(tmp_path)
    write_tensors(tmp_path, dict(written.dense.state_dict()))
    with pytest.raises(CheckpointError, match="quantised layers are needed"):
        from_pretrained(tmp_path)


# -- who loads -------------------------------------------------------------------------------------


def is_ours(folder: Path) -> bool:
    model = from_pretrained(folder)
    return any(isinstance(module, Int4Linear) for module in model.modules())


def test_who_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from effllm.integrations import quantizer

    write_checkpoint(tmp_path, Zoo("pack-quantized", symmetric=True))
    for when, installed, not_installed in (
        ("always", True, True),
        ("missing", False, True),
        ("never", False, False),
    ):
        use_quantizer(when)
        assert is_ours(tmp_path) == installed
        with monkeypatch.context() as patch:
            patch.setitem(quantizer._NEEDED, "compressed-tensors", (lambda: False,))
            assert is_ours(tmp_path) == not_installed
    with pytest.raises(ValueError, match="when must be 'missing', 'always' or 'never', got 'yes'"):
        use_quantizer("yes")  # type: ignore[arg-type]


def test_quantising_on_the_fly_is_not_touched(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="optimum"):
        from_pretrained(tmp_path, quantization_config=transformers.GPTQConfig(bits=4))


@pytest.mark.parametrize(
    "statements",
    ["import effllm, importlib; importlib.reload(effllm)", "import transformers.modeling_utils"],
    ids=["before", "after"],
)
def test_after_any_import_and_without_other_packages(statements: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Zoo("pack-quantized", dtype=torch.bfloat16))
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['compressed_tensors', 'gptqmodel', 'optimum'], None))\n"
        f"{statements}\n"
        "import effllm\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model.model.layers[0].mlp.up_proj) is effllm.nn.Int4Linear"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_layers_that_the_config_leaves_dense(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, Zoo("awq"))
    edit_config(tmp_path, modules_to_not_convert=["lm_head", "down_proj"])
    tensors = {name: t for name, t in written.tensors.items() if "down_proj" not in name}
    for i in (0, 1):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        tensors[name] = written.dense.state_dict()[name]
    write_tensors(tmp_path, tensors)
    model = from_pretrained(tmp_path)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(model), logits(effllm.load(tmp_path, progress=False)))
