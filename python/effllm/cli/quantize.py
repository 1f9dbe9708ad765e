"""`effllm quantize`: a model quantised by a method of choice, saved as a checkpoint."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import effllm
from effllm import formats
from effllm.cli.tokenizer import read_tokenizer, read_tokens
from effllm.formats.gguf_model import GGUF_FORMATS
from effllm.formats.saving import SaveFormat
from effllm.quantization import AwqConfig, GptqConfig, Granularity, LinearConfig
from effllm.quantization.method import UniformMethod

# k-means is not among them: no file format holds its codebooks.
_METHODS: dict[str, type[UniformMethod]] = {
    "linear": LinearConfig,
    "gptq": GptqConfig,
    "awq": AwqConfig,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("source", help="folder of the model, as transformers saves it")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--method", choices=_METHODS, default="awq", help="(awq)")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4, help="(4)")
    parser.add_argument(
        "--group", type=int, default=128, help="32, 64, 128, or -1 for one group per row (128)"
    )
    parser.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help="without zero points (as the method has it by default)",
    )
    parser.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="cut ranges where the error is smallest (as the method has it by default)",
    )
    parser.add_argument("--calibration", help="UTF-8 file; needed by gptq and awq")
    parser.add_argument(
        "--calibration-tokens", type=int, default=65536, help="at most so many (65536)"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence of these")
    parser.add_argument(
        "--format",
        choices=[name for name in get_args(SaveFormat) if name not in GGUF_FORMATS],
        default="compressed-tensors",
        help="of the checkpoint (compressed-tensors)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")


def run(args: argparse.Namespace) -> int:
    """Quantise all but the head, save, and print the errors of each layer and the checkpoint.

    Finished blocks are kept beside the target until it is written: after an interrupt the same
    command goes on. Returns 1, with one line on stderr, if something is missing.
    """
    source, target = Path(args.source), Path(args.out).absolute()
    state = target.with_name(f".{target.name}.state")
    try:
        config = _config(args)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is no empty folder")
        tokenizer = read_tokenizer(source)
        calibration = _calibration(args, config, tokenizer)
        model = effllm.load(source).to(torch.device(args.device))
        head = model.get_output_embeddings()
        report = effllm.quantize_(
            model,
            config,
            lambda module, name: module is not head,
            calibration=calibration,
            state=None if calibration is None else state,
        )
        if not report.layers:
            raise ValueError(f"{source} has no layers to quantise")
        effllm.save(model, target, args.format, tokenizer=tokenizer)
        shutil.rmtree(state, ignore_errors=True)
        print(report)
        print(formats.inspect(target))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"effllm quantize: {error}", file=sys.stderr)
        return 1
    return 0


def _config(args: argparse.Namespace) -> UniformMethod:
    """What the options say, the method's defaults for what they do not."""
    granularity = Granularity.channel() if args.group == -1 else Granularity.group(args.group)
    options = {"symmetric": args.symmetric, "clip": args.clip}
    given = {name: value for name, value in options.items() if value is not None}
    return _METHODS[args.method](args.bits, granularity, **given)


def _calibration(args: argparse.Namespace, config: UniformMethod, tokenizer: Any) -> Tensor | None:
    """Token ids ``[B, context]`` spread evenly over the file; None without one.

    Raises ValueError where there is no file or tokenizer and the method needs them, and for a file
    shorter than one sequence.
    """
    if args.calibration is None:
        if config.needs_calibration:
            raise ValueError(f"--method {args.method} needs --calibration FILE")
        return None
    if tokenizer is None:
        raise ValueError(f"{args.source} has no tokenizer for the calibration text")
    ids = read_tokens(tokenizer, Path(args.calibration))
    count = ids.numel() // args.context
    if count < 1:
        raise ValueError(
            f"{args.calibration} must hold at least {args.context} tokens, got {ids.numel()}"
        )
    kept = max(1, min(count, args.calibration_tokens // args.context))
    rows = ids[: count * args.context].view(count, args.context)
    return rows[torch.linspace(0, count - 1, kept).round().long()]
