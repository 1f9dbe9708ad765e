"""Heads that draft the tokens after the next one from a model's last hidden state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effllm._host import TokenTree

_CONFIG, _WEIGHTS = "config.json", "medusa_lm_head.safetensors"


class _ResidualBlock(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.linear(hidden))


class MedusaHeads(nn.ModuleList):
    """Medusa's heads: head k tells the token that comes k + 1 after the next one.

    A head is some residual blocks, each ``h + silu(linear(h))``, and a linear layer without bias
    to the vocabulary: one of its own, as published heads have it, or the model's. The latter costs
    no memory, and is read once for all heads; for an 8B model one of their own is 1 GB each. All
    heads see the same hidden state, what the model's own head is given: the token that this head
    chooses is the root of a tree, below which the heads' likeliest tokens stand.

    New heads predict what the model's head does: blocks start at zero, and ``lm_head`` is copied.

    Args:
        hidden_size, vocab_size: of the model.
        num_heads: tokens that are drafted along a path, 1 or more.
        num_layers: residual blocks in a head, 0 or more.
        tied: heads end in the model's head, which ``forward`` and ``draft`` then need.
        lm_head: [vocab_size, hidden_size], the weight of the model's head; random if None.

    Source:
        Cai et al., "Medusa" (arXiv:2401.10774). The names of the weights are those of its
        published heads.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        num_heads: int = 3,
        num_layers: int = 1,
        tied: bool = False,
        lm_head: Tensor | None = None,
    ) -> None:
        for name, value, least in (("num_heads", num_heads, 1), ("num_layers", num_layers, 0)):
            if value < least:
                raise ValueError(f"MedusaHeads: {name} must be at least {least}, got {value}")
        wanted = (vocab_size, hidden_size)
        if lm_head is not None and tuple(lm_head.shape) != wanted:
            raise ValueError(
                "MedusaHeads: lm_head must be [vocab_size, hidden_size] = "
                f"{list(wanted)}, got {list(lm_head.shape)}"
            )
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_layers, self.tied = num_layers, tied
        for _ in range(num_heads):
            head = nn.Sequential(*(_ResidualBlock(hidden_size) for _ in range(num_layers)))
            if not tied:
                head.append(nn.Linear(hidden_size, vocab_size, bias=False))
                if lm_head is not None:
                    head[-1].load_state_dict({"weight": lm_head})
            self.append(head)

    def forward(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``[..., hidden_size]`` to logits ``[num_heads, ..., vocab_size]``.

        Args:
            lm_head: the model's, from hidden states to logits; only tied heads use it.

        Raises:
            ValueError: tied heads without an ``lm_head``.
        """
        states = torch.stack([head(hidden) for head in self])
        if not self.tied:
            return states
        if lm_head is None:
            raise ValueError("MedusaHeads: lm_head must be given, as the heads are tied to it")
        return lm_head(states)

    @torch.inference_mode()
    def draft(
        self,
        hidden: Tensor,
        roots: list[int],
        lm_head: Callable[[Tensor], Tensor] | None = None,
        *,
        max_nodes: int = 64,
        candidates: int = 8,
    ) -> list[TokenTree]:
        """The likeliest tree for each sequence, with what the heads' probabilities say.

        Args:
            hidden: ``[B, hidden_size]``, of the last token of each sequence.
            roots: B tokens that the model has chosen from the same hidden states.
            lm_head: as in ``forward``.
            max_nodes: of a tree, the root included, 1 to 64.
            candidates: tokens per head that a tree may be made of.

        Raises:
            ValueError: another number of roots, options out of range, or no ``lm_head`` for tied
                heads.
        """
        if hidden.dim() != 2 or len(roots) != len(hidden):
            raise ValueError(
                "MedusaHeads.draft: hidden must be [B, hidden_size] and roots B tokens, got "
                f"{list(hidden.shape)} and {len(roots)}"
            )
        drafted = self.candidates(hidden, lm_head, candidates)
        return [
            TokenTree.best_first(root, tokens, probs, max_nodes)
            for root, tokens, probs in zip(roots, *drafted, strict=True)
        ]

    @torch.inference_mode()
    def candidates(
        self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor] | None, count: int
    ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """The ``count`` likeliest tokens of each head and their probabilities, the likeliest first.

        Args:
            hidden: ``[B, hidden_size]``.
            lm_head: as in ``forward``.

        Returns:
            Lists ``[B][num_heads][count]``, as ``TokenTree.best_first`` takes them for a sequence.

        Raises:
            ValueError: a count out of range, or no ``lm_head`` for tied heads.
        """
        if not 1 <= count <= self.vocab_size:
            raise ValueError(
                "MedusaHeads.draft: candidates must be in [1, vocab_size] = "
                f"[1, {self.vocab_size}], got {count}"
            )
        best = self(hidden, lm_head).float().softmax(-1).topk(count)
        tokens, probs = best.indices.transpose(0, 1), best.values.transpose(0, 1)
        return tokens.tolist(), probs.tolist()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``medusa_lm_head.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "medusa_num_heads": len(self),
            "medusa_num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
        }
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> MedusaHeads:
        """Reads what ``save_pretrained`` wrote, or published heads: ``medusa_lm_head.pt``.

        Published configurations, which lack the sizes, will do: these then come from the weights.
        Heads without an output layer are tied.

        Args:
            dtype: None keeps that of the file.

        Raises:
            FileNotFoundError: no weights in the folder.
            ValueError: weights that are not those of Medusa's heads.
        """
        folder = Path(folder)
        weights = _read(folder)
        try:
            num_heads = 1 + max(int(name.split(".")[0]) for name in weights)
            num_layers = sum(name.startswith("0.") and "linear.weight" in name for name in weights)
            unembedding = weights.get(f"0.{num_layers}.weight")
            if unembedding is not None:
                vocab_size, hidden_size = unembedding.shape
            else:
                config = json.loads((folder / _CONFIG).read_text())
                vocab_size, hidden_size = config["vocab_size"], config["hidden_size"]
            with torch.device("meta"):
                heads = cls(
                    hidden_size,
                    vocab_size,
                    num_heads=num_heads,
                    num_layers=num_layers,
                    tied=unembedding is None,
                )
            heads.load_state_dict(weights, assign=True)
        except (FileNotFoundError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"MedusaHeads.from_pretrained: {folder} must hold '<head>.<layer>.linear.weight', "
                f"'.bias' and '<head>.<layers>.weight' of equal shapes, the last of them or a "
                f"{_CONFIG} with sizes, got {sorted(weights)[:4]}.."
            ) from error
        return heads.to(device=device, dtype=dtype).eval()


def _read(folder: Path) -> dict[str, Any]:
    if (folder / _WEIGHTS).exists():
        return load_file(folder / _WEIGHTS)
    published = folder / "medusa_lm_head.pt"
    if not published.exists():
        raise FileNotFoundError(
            f"MedusaHeads.from_pretrained: {folder} has neither {_WEIGHTS} nor {published.name}"
        )
    weights: dict[str, Any] = torch.load(published, map_location="cpu", weights_only=True)
    return weights
