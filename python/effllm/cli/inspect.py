"""`effllm inspect`: a table of what a checkpoint holds and what would run each layer."""

import argparse
import sys

from effllm import formats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "path", help="folder with config.json and safetensors files, or a .gguf file"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 and one line on stderr if the checkpoint cannot be loaded."""
    try:
        report = formats.inspect(args.path)
    except (FileNotFoundError, formats.CheckpointError) as error:
        print(f"effllm inspect: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0
