"""quantize_ with the model on one device and the arithmetic on another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import Interrupted, assert_equal, state_of
from other_device import OTHER, other_device
from tiny_models import llama_config
from torch import Tensor, nn

import effllm
from effllm.nn import Int4Linear
from effllm.quantization import AwqConfig, GptqConfig, Granularity, KMeansConfig, LinearConfig

GROUP = Granularity.group(32)
IDS = torch.arange(4 * 24).view(4, 24) * 37 % 97
METHODS: dict[str, Any] = {
    "gptq": GptqConfig(3, GROUP, clip=True),
    "awq": AwqConfig(3, GROUP),
    "k-means": KMeansConfig(3, GROUP, weighted=True),
    "permuted, and rounded": {
        "*.self_attn.*": GptqConfig(4, GROUP, symmetric=False, static_groups=False),
        "*.mlp.*": LinearConfig(3, GROUP),
    },
}


def home_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), IDS]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_result(method: str, llama: Any) -> None:
    """Of padded batches; every product has all of its arguments on one side."""
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1:, 20:] = 0
    data = [{"input_ids": IDS[:2], "attention_mask": mask[:2]}, {"input_ids": IDS[2:]}]
    expected = copy.deepcopy(llama)
    first = effllm.quantize_(expected, METHODS[method], calibration=data, progress=False)
    with other_device(*home_of(llama), mask) as marks:
        second = effllm.quantize_(
            llama, METHODS[method], calibration=data, device=OTHER, progress=False
        )
        places = {p.device for p in (*llama.parameters(), *llama.buffers())}
    assert marks.peak > 0
    assert places == {torch.device("cpu")}
    assert first == second
    assert_equal(state_of(llama), state_of(expected))
    assert torch.equal(llama(IDS).logits, expected(IDS).logits)


def test_layer_by_layer_without_calibration(llama: Any) -> None:
    expected = copy.deepcopy(llama)
    first = effllm.quantize_(expected, LinearConfig(3, GROUP), progress=False)
    with other_device(*home_of(llama)) as marks:
        second = effllm.quantize_(llama, LinearConfig(3, GROUP), device=OTHER, progress=False)
        assert {p.device.type for p in llama.parameters()} == {"cpu"}
    assert marks.peak >= 96 * 64 * 4
    assert first == second
    assert_equal(state_of(llama), state_of(expected))


def test_biases_stay_with_their_layers() -> None:
    """A block whose layers have biases, called with a tuple of tensors."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor, more: Any) -> Any:
            (scale,), shifts = more["pair"], more["list"]
            return self.b(self.a(x * scale).relu()) + shifts[0], shifts

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.randn(64))
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            more = {"pair": (self.start,), "list": [x.mean(-1, keepdim=True)]}
            for block in self.blocks:
                x, _ = block(x, more)
            return x

    model, data = Chain(), [torch.randn(2, 9, 64)]
    expected = copy.deepcopy(model)
    effllm.quantize_(expected, METHODS["gptq"], calibration=data, progress=False)
    with other_device(*model.parameters(), *data):
        effllm.quantize_(model, METHODS["gptq"], calibration=data, device=OTHER, progress=False)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_equal(state_of(model), state_of(expected))


def test_a_run_that_was_interrupted_goes_on(llama: Any, tmp_path: Path) -> None:
    """With the other device or without; the finished blocks are the same."""
    config = Interrupted(3, GROUP)
    Interrupted.left = 10**9
    expected, third = copy.deepcopy(llama), copy.deepcopy(llama)
    effllm.quantize_(expected, config, calibration=IDS, progress=False)
    options: dict[str, Any] = {"calibration": IDS, "state": tmp_path, "progress": False}
    with other_device(*home_of(llama)):
        Interrupted.left = 16
        with pytest.raises(KeyboardInterrupt):
            effllm.quantize_(llama, config, device=OTHER, **options)
        # Nothing is left behind on the other device.
        assert {p.device.type for p in llama.parameters()} == {"cpu"}
        kinds = [type(layer.mlp.up_proj) for layer in llama.model.layers]
        assert kinds == [Int4Linear, Int4Linear, nn.Linear]
        Interrupted.left = 8
        effllm.quantize_(llama, config, device=OTHER, **options)
    assert Interrupted.left == 0
    assert_equal(state_of(llama), state_of(expected))
    effllm.quantize_(third, config, **options)
    assert Interrupted.left == 0
    assert_equal(state_of(third), state_of(expected))


def block_bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.model.layers[0].parameters())


def peak_bytes(layers: int, ids: Tensor, batches: int) -> tuple[int, int]:
    """What is on the other device at most, whenever something arrives there; and a block's size."""
    import transformers

    model = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=layers)).eval()
    size = block_bytes(model)
    with other_device(*model.parameters(), *model.buffers(), ids) as marks:
        effllm.quantize_(
            model,
            LinearConfig(3, GROUP),
            lambda module, name: name != "lm_head",
            calibration=[ids] * batches,
            device=OTHER,
            progress=False,
        )
    return marks.peak, size


def test_one_block_at_a_time() -> None:
    """Of six. Few tokens: weights are what counts."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    peak, size = peak_bytes(6, IDS[:1, :4], 2)
    assert size < peak < 2 * size


def test_the_inputs_of_one_batch_at_a_time() -> None:
    """Those of all fifty would be as large as two blocks."""
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    ids = IDS[:1]
    few, size = peak_bytes(2, ids, 2)
    assert 50 * ids.numel() * 64 * 4 > 2 * size
    assert peak_bytes(2, ids, 50)[0] < few + size / 10


@pytest.mark.gpu
def test_peak_memory_is_that_of_one_block() -> None:
    """Weights of a block in fp32, the moments of one layer's inputs, the activations of a batch.

    Slack: twelve fp32 copies of the largest weight while it is rounded and judged, and the 64 MB
    that cuBLAS takes once. All of it is less than half of the model.
    """
    import transformers

    k, inner = 1024, 2816
    config = llama_config(
        hidden_size=k,
        intermediate_size=inner,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=4096,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    whole, size = sum(p.nbytes for p in model.parameters()), block_bytes(model)
    ids = torch.arange(4 * 256).view(4, 256) * 37 % 4096
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    effllm.quantize_(
        model,
        LinearConfig(4, Granularity.group(128)),
        lambda module, name: name != "lm_head",
        calibration=[ids[i : i + 1] for i in range(4)],
        device="cuda",
        progress=False,
    )
    peak = torch.cuda.max_memory_allocated() - before
    # What all modules of a block give, which is kept while their inputs are traced.
    activations = 4 * 256 * (16 * k + 6 * inner)
    bound = size + 4 * inner**2 + activations + 12 * 4 * k * inner + 2**26
    assert bound < whole / 2
    assert size < peak < bound
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated() <= before + 2**26


@pytest.mark.gpu
def test_errors_are_those_of_the_cpu(llama: Any) -> None:
    expected = copy.deepcopy(llama)
    first = effllm.quantize_(expected, METHODS["gptq"], calibration=IDS, progress=False)
    second = effllm.quantize_(
        llama, METHODS["gptq"], calibration=IDS, device="cuda", progress=False
    )
    assert {p.device.type for p in llama.parameters()} == {"cpu"}
    errors = [layer.output_error for layer in second.layers]
    assert errors == pytest.approx([layer.output_error for layer in first.layers], rel=0.1)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device 'gpu' cannot be used: "),
        ("cuda:99", "device 'cuda:99' cannot be used: "),
        ("meta", "device must hold data, got 'meta'"),
    ],
)
def test_errors(device: str, message: str, llama: Any) -> None:
    for calibration in (None, IDS):
        with pytest.raises(ValueError, match=f"effllm.quantize_: {message}"):
            effllm.quantize_(llama, LinearConfig(), calibration=calibration, device=device)
    assert type(llama.lm_head) is nn.Linear
