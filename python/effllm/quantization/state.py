"""Finished parts of a run on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effllm.nn import (
    Fp8Linear,
    GgufLinear,
    Int4Linear,
    Int8Linear,
    Lut4Linear,
    W4A8Linear,
    W8A8Linear,
)
from effllm.nn.quantized_linear import QuantizedLinear, frozen
from effllm.quantization.calibration import update_digest
from effllm.quantization.report import LayerResult
from effllm.quantization.targets import Target

_KINDS: dict[str, type[QuantizedLinear]] = {
    kind.__name__: kind
    for kind in (Fp8Linear, GgufLinear, Int4Linear, Int8Linear, Lut4Linear, W4A8Linear, W8A8Linear)
}


@dataclass
class PartResult:
    """What has become of a part of the model.

    Attributes:
        layers: the quantised ones by name.
        results: of each, in the order in which it was done.
        changed: other parameters that took over scales, by name.
        folded: names of the modules that did, with those they took them from.
    """

    layers: dict[str, QuantizedLinear]
    results: list[LayerResult]
    changed: dict[str, Tensor]
    folded: dict[str, list[str]]


def fingerprint(module: nn.Module, targets: list[Target], calibration: str) -> str:
    """Tells whether a stored part is of this weight, these methods and this data."""
    digest = hashlib.blake2b(calibration.encode(), digest_size=16)
    for target in targets:
        digest.update(f"{target.names}{target.method!r}".encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        update_digest(digest, tensor)
    return digest.hexdigest()


class RunState:
    """A folder with one safetensors file for each finished part."""

    def __init__(self, folder: str | Path) -> None:
        """Makes the folder if it is not there."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def store(self, index: int, mark: str, part: PartResult) -> None:
        """Writes a finished part; a file is there in whole or not at all."""
        tensors = {f"changed.{name}": tensor for name, tensor in part.changed.items()}
        kinds = {}
        for name, layer in part.layers.items():
            kinds[name] = [type(layer).__name__, layer.options]
            for key, value in layer.state_dict().items():
                tensors[f"layer.{name}.{key}"] = value
        about = {
            "fingerprint": mark,
            "kinds": kinds,
            "results": [asdict(result) for result in part.results],
            "folded": part.folded,
        }
        path = self._path(index)
        unfinished = path.with_suffix(".part")
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, unfinished, {"effllm": json.dumps(about)})
        os.replace(unfinished, path)

    def load(self, index: int, mark: str, targets: list[Target]) -> PartResult | None:
        """A part that an earlier run has finished; None if none has.

        Raises:
            ValueError: the file is of another model, config or calibration.
        """
        path = self._path(index)
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["effllm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["fingerprint"] != mark:
            raise ValueError(
                f"effllm.quantize_: {path} is of a run with another model, config or calibration; "
                "name another folder for the state or remove this one"
            )
        linears = {target.names[0]: target.linear for target in targets}
        layers = {}
        for name, (kind, options) in about["kinds"].items():
            prefix = f"layer.{name}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            layers[name] = _restore(linears[name], _KINDS[kind], options, own)
        return PartResult(
            layers,
            [LayerResult(**result) for result in about["results"]],
            {k.removeprefix("changed."): t for k, t in tensors.items() if k.startswith("changed.")},
            about["folded"],
        )

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index:04}.safetensors"


def _restore(
    linear: nn.Linear,
    kind: type[QuantizedLinear],
    options: dict[str, Any],
    tensors: dict[str, Tensor],
) -> QuantizedLinear:
    device = linear.weight.device
    sizes = (linear.in_features, linear.out_features)
    layer = kind(*sizes, bias=False, device="meta", dtype=None, **options)
    # Copies: in the file tensors start anywhere, and the kernels want aligned ones.
    for name in (*kind.quantised, "bias"):
        tensor = tensors.get(name)
        layer.register_parameter(
            name, None if tensor is None else frozen(tensor.to(device, copy=True))
        )
    return layer.train(linear.training)
