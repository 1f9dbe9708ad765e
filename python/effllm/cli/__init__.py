"""The command line, `python -m effllm <command>`, on argparse alone: it needs no extra."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each is a module here with `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "env": "show versions, what is built, the GPUs, and why something is unavailable",
    "inspect": "show the layers of a checkpoint: format, bits, group size, kernel, bytes",
    "convert": "write a checkpoint in another format, quantised to 4 bits if it is not yet",
    "quantize": "quantise a model by a method of choice and save it",
    "eval": "score a text or tasks of lm-eval with a model: perplexity, speed, accuracy",
    "demo": "quantise the model that comes with effllm, and generate text with it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` defaults to the process's arguments. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="effllm", description="Efficient large language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # Only the named command is imported: `env` must work where an extra of `demo` is missing.
        if name in arguments[:1]:
            module = importlib.import_module(f"effllm.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status
