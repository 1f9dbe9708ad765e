"""`effllm eval`: perplexity of a checkpoint over a text and its speed, and its scores in tasks."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import effllm
from effllm.cli.tokenizer import read_tokenizer, read_tokens
from effllm.evaluation import score_text
from effllm.integrations.lm_eval import TaskScore, TaskSuite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "path", help="folder with config.json and safetensors files, or a .gguf file"
    )
    parser.add_argument("--text", help="UTF-8 file to score")
    parser.add_argument(
        "--tasks", help="of lm-eval, separated by commas: hellaswag,arc_easy (needs effllm[eval])"
    )
    parser.add_argument("--include-path", help="folder with YAML files of more tasks for lm-eval")
    parser.add_argument("--context", type=int, help="tokens of a window (the model's, up to 2048)")
    parser.add_argument(
        "--stride", type=int, help="tokens from window to window of the text (half of the context)"
    )
    parser.add_argument("--limit", type=int, help="tokens of the text, examples of a task (all)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows or requests at once (4)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--out", help="JSON file for the results")


def run(args: argparse.Namespace) -> int:
    """Print a line for the text and a table for the tasks, all with effllm's attention.

    Returns 1, with one line on stderr, if something is missing.
    """
    try:
        out = None if args.out is None else Path(args.out)
        if args.text is None and args.tasks is None:
            raise ValueError("nothing to score: --text FILE or --tasks NAME,NAME is needed")
        if out is not None and not out.absolute().parent.is_dir():
            # Known before hours are spent on results.
            raise FileNotFoundError(f"--out {out}: its folder does not exist")
        names = [name for name in (args.tasks or "").split(",") if name]
        suite = None if args.tasks is None else TaskSuite(names, args.include_path)
        source = Path(args.path)
        tokenizer = read_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source} has no tokenizer")
        ids = None if args.text is None else read_tokens(tokenizer, Path(args.text))[: args.limit]
        model = effllm.load(source, attn_implementation="effllm").to(torch.device(args.device))
        results: dict[str, Any] = {
            "path": str(source),
            "effllm": effllm.__version__,
            "torch": torch.__version__,
            "limit": args.limit,
        }
        if ids is not None:
            context = args.context or min(2048, model.config.max_position_embeddings)
            stride = args.stride or max(1, context // 2)
            score = score_text(
                model,
                ids,
                context=context,
                stride=stride,
                batch_size=args.batch_size,
                progress=True,
            )
            print(
                f"perplexity {score.perplexity:.4f} over {score.tokens} tokens (context {context}, "
                f"stride {stride}), {score.tokens_per_s:.1f} tokens/s"
            )
            results["text"] = {
                "file": args.text,
                "context": context,
                "stride": stride,
                "perplexity": score.perplexity,
                "tokens_per_s": score.tokens_per_s,
                **asdict(score),
            }
        if suite is not None:
            scores = suite.score(
                model, tokenizer, batch_size=args.batch_size, context=args.context, limit=args.limit
            )
            print(_table(scores))
            results["tasks"] = [asdict(row) for row in scores]
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"effllm eval: {error}", file=sys.stderr)
        return 1
    return 0


def _table(scores: list[TaskScore]) -> str:
    """A line for each metric."""
    task = max([4, *(len(score.task) for score in scores)])
    metric = max([6, *(len(score.metric) for score in scores)])
    lines = [f"{'task':<{task}}  {'metric':<{metric}}   value  stderr  examples"]
    for score in scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        examples = "" if score.examples is None else score.examples
        lines.append(
            f"{score.task:<{task}}  {score.metric:<{metric}}  {score.value:.4f}  {stderr:>6}  "
            f"{examples:>8}".rstrip()
        )
    return "\n".join(lines)
