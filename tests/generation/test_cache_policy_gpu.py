"""generate(cache_policy=...) on a GPU in fp16, against the dense attention matrix in fp32."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.testing.compare import SLACK, assert_close_to_reference

pytest.importorskip("transformers", reason="needs the extra effllm[hf]")

from dense_policies import DensePolicy
from test_cache_policy import POLICIES, Stepper, each_policy, llama, text

__all__ = ["llama"]

FP16_REGRET = 0.026
"""What fp16 costs choices on a CPU: in four texts, with H2O and TOVA, nobody went whose score was
by more above the lowest (measured: 0.025)."""


@dataclass
class Played:
    """A text through the paged model in fp16, beside the dense matrix in fp32 that keeps the same
    tokens: close choices may differ, and then do so for good."""

    logits: Tensor
    exact: Tensor
    regret: float
    """How far the choices were from the best."""

    @classmethod
    def on(cls, device: str, llama: Any, name: str, seed: int = 0) -> Played:
        policy, reference = POLICIES[name]
        prompt, tokens = 60, text(160, seed)
        fast = Stepper(copy.deepcopy(llama).to(device, torch.float16), policy, prompt, 100)
        slow = DensePolicy(llama, **reference)
        logits, exact = [], []
        for part in (tokens[:prompt], *([token] for token in tokens[prompt:])):
            logits.append(fast.feed(part)[-1].float().cpu())
            if policy.counts_decoding:
                slow.follows = [[fast.kept(layer, head) for head in range(2)] for layer in range(3)]
            exact.append(slow.feed(part)[-1])
        assert fast.cache.length(fast.seq) == 160
        return cls(torch.stack(logits), torch.stack(exact).double(), slow.largest_regret)


@pytest.mark.gpu
@each_policy
def test_gpu_decoding_is_that_of_the_dense_matrix(llama: Any, name: str) -> None:
    """In fp16, as close as a CPU is in fp16 to the dense matrices of some texts."""
    ours = Played.on("cuda", llama, name)
    plain = [Played.on("cpu", llama, name, seed) for seed in range(3)]
    error = torch.stack([each.logits - each.exact for each in plain]).abs().amax(0)
    # SnapKV chooses once, behind the prompt's logits, and nobody is told what.
    steps = slice(1) if name.startswith("snap") else slice(None)
    exact = ours.exact[steps]
    assert_close_to_reference(
        ours.logits[steps], exact, exact + error[steps], dtype=torch.float16, name="logits"
    )
    assert ours.regret <= SLACK * FP16_REGRET
