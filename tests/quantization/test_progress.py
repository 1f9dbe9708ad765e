"""What the progress bar of quantize_ shows."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from tqdm import tqdm

import effllm
from effllm.quantization import Granularity, LinearConfig, report

IDS = torch.arange(4 * 24).view(4, 24) * 37 % 97


@pytest.mark.parametrize("calibration", [None, IDS])
def test_time_left_and_the_error_of_each_layer(
    calibration: Any,
    llama: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Every step, not ten in a second.
    always = functools.partial(tqdm, mininterval=0, ncols=200)
    monkeypatch.setattr(report, "tqdm", always)
    found = effllm.quantize_(llama, LinearConfig(3, Granularity.group(32)), calibration=calibration)
    printed = capsys.readouterr().err
    steps = re.findall(r"(\d+)/22 \[\d\d:\d\d<\d\d:\d\d, .*?, error=(\S+), layer=(\S+)\]", printed)
    errors = [(r.weight_error if calibration is None else r.output_error) for r in found.layers]
    assert [int(done) for done, _, _ in steps] == list(range(1, 23))
    assert [name for _, _, name in steps] == [layer.name for layer in found.layers]
    assert [float(error) for _, error, _ in steps] == pytest.approx(errors, rel=1e-2)


def test_nothing_without_progress_or_layers(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    effllm.quantize_(llama, LinearConfig(3, Granularity.group(32)), calibration=IDS, progress=False)
    effllm.quantize_(torch.nn.Sequential(torch.nn.ReLU()), LinearConfig())
    assert capsys.readouterr().err == ""
