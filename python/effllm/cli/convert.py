"""`effllm convert`: a checkpoint into another format; what is not quantised yet, into int4."""

import argparse
import shutil
import sys
from pathlib import Path

import effllm
from effllm import formats, nn

# What a checkpoint has beside config and weights.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "source", help="folder with config.json and safetensors files, or a .gguf file"
    )
    parser.add_argument("target", help="folder to make")
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "gptq_v2", "awq"),
        default="compressed-tensors",
        help="of the target (compressed-tensors)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        help="where the source is not quantised: 32, 64, 128, or -1 for one group per row (64)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="where the source is not quantised: with zero points",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print the report of the target; 1 and one line on stderr if that fails.

    Codes are carried over as they are; the tokenizer of a GGUF file is not. An unquantised model is
    rounded to nearest, its output head left as it is.
    """
    try:
        config = effllm.Int4Config(args.group_size, symmetric=not args.asymmetric)
        model = effllm.load(args.source)
        if not any(isinstance(module, nn.Int4Linear) for module in model.modules()):
            head = model.get_output_embeddings()
            effllm.quantize_(model, config, lambda module, name: module is not head)
        effllm.save(model, args.target, args.format)
        for pattern in _TOKENIZER_FILES:
            for path in Path(args.source).glob(pattern):
                shutil.copy(path, args.target)
        print(formats.inspect(args.target))
    except (ImportError, OSError, ValueError) as error:
        print(f"effllm convert: {error}", file=sys.stderr)
        return 1
    return 0
