"""`effllm convert`: a checkpoint into another format; what is not quantised yet, too."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import get_args

import torch

import effllm
from effllm import formats
from effllm.cli.tokenizer import TOKENIZER_FILES, read_tokenizer
from effllm.formats.gguf_model import GGUF_FORMATS, is_gguf
from effllm.formats.saving import SaveFormat
from effllm.nn import GgufLinear
from effllm.nn.quantized_linear import QuantizedLinear
from effllm.quantization import Method, dequantize_


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "source", help="folder with config.json and safetensors files, or a .gguf file"
    )
    parser.add_argument("target", help="folder to make, or .gguf file")
    parser.add_argument(
        "--format",
        choices=get_args(SaveFormat),
        default="compressed-tensors",
        help="of the target (compressed-tensors)",
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="from or to a .gguf file: leave its tokenizer out, one that cannot be converted say",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        help="where the source is not quantised, and the target is a folder: 32, 64, 128, or -1 "
        "for one group per row (64)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="where the source is not quantised: with zero points",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print the report of the target; 1 and one line on stderr if that fails.

    Codes are carried over as they are; those of Q8_0, Q4_K and Q6_K only between GGUF files of such
    types, for folders these layers count as not quantised. An unquantised model is rounded to
    nearest, into int4 or, for those formats, FP8 or W8A8, its head left as it is; for GGUF all is
    rounded by the format itself.
    """
    source, target = Path(args.source), Path(args.target)
    to_gguf = args.format in GGUF_FORMATS
    try:
        config: Method = effllm.Int4Config(args.group_size, symmetric=not args.asymmetric)
        if args.format == "compressed-tensors-fp8":
            config = effllm.Fp8Config()
        elif args.format == "compressed-tensors-int8":
            config = effllm.Int8Config()
        # From one GGUF file to another, values pass through the model: no dtype of less bits.
        model = effllm.load(source, dtype=torch.float32 if to_gguf and is_gguf(source) else None)
        if not to_gguf:
            dequantize_(model, model.dtype, GgufLinear)  # the blocks of GGUF alone are these
        packed = any(isinstance(module, QuantizedLinear) for module in model.modules())
        if not packed and not to_gguf and args.format != "bitsandbytes":
            head = model.get_output_embeddings()
            effllm.quantize_(model, config, lambda module, name: module is not head)
        tokenizer = None
        if (to_gguf or is_gguf(source)) and not args.no_tokenizer:
            tokenizer = read_tokenizer(source)
        effllm.save(model, target, args.format, tokenizer=tokenizer)
        if not to_gguf:
            for pattern in TOKENIZER_FILES:
                for path in source.glob(pattern):
                    shutil.copy(path, target)
        print(formats.inspect(target))
    except (ImportError, OSError, ValueError) as error:
        print(f"effllm convert: {error}", file=sys.stderr)
        return 1
    return 0
