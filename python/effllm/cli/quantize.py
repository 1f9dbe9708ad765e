"""`effllm quantize`: a model quantised by a method of choice, saved as a checkpoint."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import effllm
from effllm import formats
from effllm.cli.tokenizer import read_tokenizer, read_tokens
from effllm.formats.gguf_model import GGUF_FORMATS
from effllm.formats.saving import SaveFormat
from effllm.nn import GgufLinear
from effllm.nn.scaled_linear import BLOCK
from effllm.quantization import (
    AwqConfig,
    Fp8Config,
    GgufConfig,
    GptqConfig,
    Granularity,
    Int8Config,
    KMeansConfig,
    LinearConfig,
    Method,
    SmoothQuantConfig,
    choose_configs,
    dequantize_,
)
from effllm.quantization.configs import GgufType
from effllm.quantization.method import UniformMethod
from effllm.quantization.quantize import usable_device

_UNIFORM: dict[str, type[UniformMethod]] = {
    "linear": LinearConfig,
    "gptq": GptqConfig,
    "awq": AwqConfig,
}
_DENSE = "dense"
_GGUF: dict[str, GgufType] = {f"gguf-{name}": name for name in get_args(GgufType)}
# The formats of each method; the first is the default.
_FP8, _INT8 = "compressed-tensors-fp8", "compressed-tensors-int8"
_SAFETENSORS = tuple(
    name for name in get_args(SaveFormat) if name not in (*GGUF_FORMATS, _FP8, _INT8)
)
_FORMATS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_UNIFORM, (*_SAFETENSORS, _DENSE)),
    "kmeans": (_DENSE,),
    "gguf": (*_GGUF, _DENSE),
    "fp8": (_FP8, _DENSE),
    "int8": (_INT8, _DENSE),
    "smoothquant": (_INT8, _DENSE),
}
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_UNIFORM, ("bits", "average-bits", "group", "symmetric", "clip")),
    "kmeans": ("bits", "average-bits", "group", "weighted"),
    "gguf": (),
    "fp8": ("scales", "inputs"),
    "int8": ("scales", "inputs"),
    "smoothquant": ("scales", "inputs", "alpha"),
}
_BLOCK = Granularity.block(BLOCK, BLOCK)
_SCALES = {"tensor": Granularity.tensor(), "channel": Granularity.channel(), "block": _BLOCK}
_INPUTS = {
    "tensor": Granularity.tensor(),
    "static": Granularity.tensor(),
    "token": Granularity.token(),
    "group": Granularity.group(BLOCK),
    "wide": None,
}
# What goes with the scales of weights.
_DEFAULT_INPUTS = {"tensor": "tensor", "channel": "token", "block": "group"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("source", help="folder of the model, as transformers saves it")
    parser.add_argument("--out", required=True, help="folder to make; for gguf a file")
    parser.add_argument("--method", choices=_FORMATS, default="awq", help="(awq)")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), help="(4); 8: linear, gptq, awq")
    parser.add_argument(
        "--average-bits",
        type=float,
        help="2 to 4, instead of --bits: each layer gets 2, 3 or 4 by how much its output suffers "
        "(files hold all codes in the room of 4 bits)",
    )
    parser.add_argument("--group", type=int, help="32, 64, 128, or -1 for one group per row (128)")
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
    parser.add_argument(
        "--weighted",
        action="store_true",
        default=None,
        help="kmeans: weights count by the mean square of their inputs",
    )
    parser.add_argument(
        "--scales",
        choices=_SCALES,
        help="fp8, int8, smoothquant: what of a weight has a scale each, block of fp8 alone "
        "(channel)",
    )
    parser.add_argument(
        "--inputs",
        choices=_INPUTS,
        help="what of inputs has a scale each, found at run time, for static by calibration; wide: "
        "they are not rounded (fp8: token, or tensor or group if --scales is tensor or block; int8 "
        "and smoothquant: token, or static)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="smoothquant: 0 leaves outliers to inputs, 1 moves them to weights (what is best for "
        "each input)",
    )
    parser.add_argument(
        "--calibration",
        help="UTF-8 file; needed by gptq, awq, smoothquant, --weighted, --inputs static and "
        "--average-bits",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=65536, help="at most so many (65536)"
    )
    parser.add_argument(
        "--context", type=int, default=512, help="tokens of a sequence of these (512)"
    )
    parser.add_argument(
        "--format",
        choices=[*_SAFETENSORS, _FP8, _INT8, *_GGUF, _DENSE],
        help=f"of the checkpoint (compressed-tensors; gguf-q4_0 for gguf); {_DENSE} has decoded "
        "weights, as large as before: to measure what a method costs, and the only one for kmeans",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where to compute: cpu or cuda, which need hold only one block at a time, but with "
        "--average-bits all of the model (cpu)",
    )


def run(args: argparse.Namespace) -> int:
    """Quantise all but the head, save, and print the errors of each layer and the checkpoint.

    A GGUF file has the head in the type of the other matrices, so there it is quantised too.
    Finished blocks are kept beside the target until it is written: after an interrupt the same
    command goes on. Returns 1, with one line on stderr, if something is missing.
    """
    source, target = Path(args.source), Path(args.out).absolute()
    state = target.with_name(f".{target.name}.state")
    try:
        possible = (_INT8, _DENSE) if args.bits == 8 else _FORMATS[args.method]
        file_format: Any = args.format or possible[0]
        if file_format not in possible:
            raise ValueError(
                f"--format {file_format} does not hold what --method {args.method} makes"
                f"{' of 8 bits' if args.bits == 8 else ''}; use "
                f"{' or '.join(possible)}"
            )
        configs = _configs(args, file_format)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is no empty folder")
        tokenizer = read_tokenizer(source)
        calibration = _calibration(args, configs, tokenizer)
        device = usable_device(args.device)
        model = effllm.load(source)
        dequantize_(model, model.dtype, GgufLinear)
        head = model.get_output_embeddings()

        def chosen(module: nn.Module, name: str) -> bool:
            return file_format in _GGUF or module is not head

        mixture: Method | dict[str, Method] = configs[0]
        if args.average_bits is not None:
            assert calibration is not None
            model.to(device)
            mixture = choose_configs(
                model, configs, calibration, average_bits=args.average_bits, filter_fn=chosen
            )
            model.to("cpu")
        report = effllm.quantize_(
            model,
            mixture,
            chosen,
            calibration=calibration,
            state=None if calibration is None else state,
            device=device,
        )
        if not report.layers:
            raise ValueError(f"{source} has no layers to quantise")
        if file_format == _DENSE:
            _save_dense(model, target, tokenizer)
        else:
            effllm.save(model, target, file_format, tokenizer=tokenizer)
        shutil.rmtree(state, ignore_errors=True)
        print(report)
        print(formats.inspect(target))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"effllm quantize: {error}", file=sys.stderr)
        return 1
    return 0


def _configs(args: argparse.Namespace, file_format: str) -> list[Method]:
    """What the options say, the method's defaults for what they do not: one config, or one for each
    number of bits to choose from.

    Raises ValueError for options that do not go together.
    """
    values = {name: getattr(args, name.replace("-", "_")) for name in sum(_OPTIONS.values(), ())}
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in _OPTIONS[args.method]:
            raise ValueError(f"--method {args.method} has no --{name}")
    if args.method == "gguf":
        return [GgufConfig(_GGUF.get(file_format, "q4_0"))]
    if args.method == "fp8":
        scales = args.scales or "channel"
        inputs = args.inputs or _DEFAULT_INPUTS[scales]
        return [Fp8Config(_SCALES[scales], _INPUTS[inputs], static=inputs == "static")]
    if args.method in ("int8", "smoothquant"):
        granularity = _SCALES[args.scales or "channel"]
        inputs = _INPUTS[args.inputs or "token"]
        static = args.inputs == "static"
        if args.method == "int8":
            return [Int8Config(granularity, inputs, static)]
        return [SmoothQuantConfig(granularity, inputs, static, args.alpha)]
    group = given.pop("group", 128)
    granularity = Granularity.channel() if group == -1 else Granularity.group(group)
    for name in ("bits", "average-bits"):
        given.pop(name, None)
    bits = [args.bits or 4]
    if args.average_bits is not None:
        if args.bits is not None or not 2 <= args.average_bits <= 4:
            raise ValueError(
                "--average-bits must be in 2..4 and without --bits, got "
                f"{args.average_bits:g} and --bits {args.bits}"
            )
        bits = [2, 3, 4]
    if args.method == "kmeans":
        return [KMeansConfig(b, granularity, **given) for b in bits]
    return [_UNIFORM[args.method](b, granularity, **given) for b in bits]


def _save_dense(model: Any, target: Path, tokenizer: Any) -> None:
    """The decoded weights as transformers saves them; the folder is there in whole or not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    dequantize_(model, model.dtype)
    model.save_pretrained(unfinished)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)


def _calibration(args: argparse.Namespace, configs: list[Method], tokenizer: Any) -> Tensor | None:
    """Token ids ``[B, context]`` spread evenly over the file; None without one.

    Raises ValueError where there is no file or tokenizer and the method needs them, and for a file
    shorter than one sequence.
    """
    if args.calibration is None:
        if args.average_bits is not None:
            raise ValueError("--average-bits needs --calibration FILE")
        if configs[0].needs_calibration:
            option = " --weighted" if args.weighted else ""
            option += " --inputs static" if args.inputs == "static" else ""
            raise ValueError(f"--method {args.method}{option} needs --calibration FILE")
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
