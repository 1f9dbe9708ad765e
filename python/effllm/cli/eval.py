"""`effllm eval`: perplexity of a checkpoint over a text, and its speed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import effllm
from effllm.cli.tokenizer import read_tokenizer, read_tokens
from effllm.evaluation import score_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "path", help="folder with config.json and safetensors files, or a .gguf file"
    )
    parser.add_argument("--text", required=True, help="UTF-8 file to score")
    parser.add_argument("--context", type=int, help="tokens of a window (the model's, up to 2048)")
    parser.add_argument(
        "--stride", type=int, help="tokens from window to window (half of the context)"
    )
    parser.add_argument("--limit", type=int, help="tokens of the text (all)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once (4)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")


def run(args: argparse.Namespace) -> int:
    """Print one line of results; 1 and one line on stderr if something is missing."""
    try:
        source = Path(args.path)
        model = effllm.load(source).to(torch.device(args.device))
        tokenizer = read_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source} has no tokenizer")
        ids = read_tokens(tokenizer, Path(args.text))[: args.limit]
        context = args.context or min(2048, model.config.max_position_embeddings)
        score = score_text(
            model,
            ids,
            context=context,
            stride=args.stride,
            batch_size=args.batch_size,
            progress=True,
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"effllm eval: {error}", file=sys.stderr)
        return 1
    print(
        f"perplexity {score.perplexity:.4f} over {score.tokens} tokens (context {context}, stride "
        f"{args.stride or max(1, context // 2)}), {score.tokens_per_s:.1f} tokens/s"
    )
    return 0
