"""``from_pretrained`` of transformers for quantised checkpoints, with effllm's layers.

transformers chooses by ``quant_method`` of ``config.json``: a class that parses the config, which
names the quantizer that loads the weights. Here its entries for AWQ, GPTQ, compressed-tensors and
bitsandbytes are replaced by classes that ask ``effllm.integrations.use_quantizer`` first. Where it
says so, the config becomes an ``EffllmConfig``, whose quantizer, registered under a name of its
own, reads the layers with ``effllm.formats``; else the call goes on as if effllm were not there.
Quantising on the fly (``quantization_config=`` for a checkpoint that is not quantised) stays with
transformers always.

The layers are what ``effllm.load`` makes of the same folder. Their names must be those of modules;
tensors that are not part of a quantised layer are transformers' to load and to report.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_compressed_tensors_available,
    is_gptqmodel_available,
    is_optimum_available,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from effllm.formats.checkpoint import Checkpoint, CheckpointError
from effllm.formats.config import parse_config
from effllm.formats.grouped import GroupedWeight
from effllm.formats.layers import StoredLayer, checked_linear, find_layers
from effllm.formats.reading import read_bias, read_weight
from effllm.formats.report import LayerReport, model_report, stored_report
from effllm.formats.weights import make_linear
from effllm.integrations import quantizer_use
from effllm.nn.quantized_linear import QuantizedLinear

__all__ = ["EffllmConfig", "EffllmQuantizer"]

# By key of transformers' table of configs: what transformers asks before it loads such a file.
_NEEDED: dict[str, tuple[Callable[[], bool], ...]] = {
    "awq": (is_gptqmodel_available,),
    "gptq": (is_gptqmodel_available, is_optimum_available),
    "compressed-tensors": (is_compressed_tensors_available,),
    "bitsandbytes_4bit": (is_bitsandbytes_available,),
    "bitsandbytes_8bit": (is_bitsandbytes_available,),
}


class EffllmConfig(QuantizationConfigMixin):
    """A checkpoint's ``quantization_config``, untouched, and that effllm is to read it.

    Attributes:
        stored: as in ``config.json``; also what ``to_dict`` gives.
    """

    def __init__(self, stored: dict[str, Any]) -> None:
        self.quant_method: Any = "effllm"
        self.stored = copy.deepcopy(stored)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)


class EffllmQuantizer(HfQuantizer):
    """Loads the quantised layers of a safetensors checkpoint as ``effllm.load`` would.

    Raises CheckpointError as ``effllm.load`` does, and ValueError for tensor parallelism.
    """

    requires_calibration = True

    def __init__(self, quantization_config: EffllmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._reader: _LayerReader | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("effllm: quantised layers cannot be sharded while they are loaded")
        checkpoint = _open(kwargs.get("checkpoint_files"))
        self._reader = _LayerReader(model, checkpoint, self.quantization_config.stored)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [] if self._reader is None else [_LayerConverter(self._reader)]

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        size = None if self._reader is None else self._reader.element_size(param_name)
        return param.element_size() if size is None else size

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        reader, self._reader = self._reader, None  # which holds files open
        assert reader is not None
        rows = reader.finish(model)
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not isinstance(conversion, _LayerConverter)
        ]
        model.effllm_report = model_report(model, rows)
        if not _is_packed(model):
            # All was expanded: this is a plain model, and is saved and cast as one.
            self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """Raises ValueError: ``save_pretrained`` knows no packed layers, ``effllm.save`` does."""
        raise ValueError(
            "effllm: save_pretrained cannot write packed layers; use effllm.save(model, path)"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters are: gradients flow through the layers to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def refuse_save_pretrained(model: Any) -> None:
    """Makes ``save_pretrained`` of a model with packed layers raise; others stay as they are.

    It would write the packed tensors under a config that does not tell what they are.
    """
    if _is_packed(model):
        model.hf_quantizer = EffllmQuantizer(EffllmConfig({}))


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def _open(files: list[str] | None) -> Checkpoint:
    found = "a state dict" if not files else Path(files[0]).name
    if not files or not found.endswith(".safetensors"):
        raise CheckpointError(f"effllm reads quantised layers from safetensors files, got {found}")
    return Checkpoint(Path(files[0]).parent, files)


class _LayerReader:
    """Which tensors belong to which layer of a model, and layers out of tensors.

    Headers are checked against the model when it is made, before any weight is read.

    Attributes:
        parts: name of a tensor -> (name of the model's weight that it is part of, name of the
            part without the layer's).
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
        quant_config = parse_config(checkpoint.folder / "config.json", config)
        layers = find_layers(checkpoint, quant_config)
        if not layers:
            raise CheckpointError(
                f"{quant_config.source}: quantised layers are needed, the tensors are of none"
            )
        self.checkpoint = checkpoint
        self.parts: dict[str, tuple[str, str]] = {}
        self._layers: dict[str, StoredLayer] = {}
        self._rows: dict[str, LayerReport] = {}
        self._error: CheckpointError | None = None
        for layer in layers.values():
            self._add(model, layer)
        self._refuse_strays()

    def _add(self, model: Any, layer: StoredLayer) -> None:
        name = layer.name
        prefix = f"{model.base_model_prefix}."
        if name.startswith(prefix) and not hasattr(model, model.base_model_prefix):
            name = name.removeprefix(prefix)  # AutoModel: a model without its head
        module = checked_linear(model, layer, self.checkpoint, name)
        bias = read_bias(self.checkpoint, layer.name, module, "cpu")
        if bias is not None and module.bias is None:
            module.bias = nn.Parameter(torch.empty_like(bias, device="meta"))
        elif bias is None and f"{layer.name}.bias" in self.checkpoint.tensors:
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            ignored.add(f"^{re.escape(layer.name)}\\.bias$")
            model._keys_to_ignore_on_load_unexpected = ignored
        if model.get_output_embeddings() is module:
            # A packed head is nobody's embedding, whatever the config said.
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
        self._layers[f"{name}.weight"] = layer
        for tensor in layer.tensors(self.checkpoint):
            self.parts[tensor] = (f"{name}.weight", tensor.removeprefix(f"{layer.name}."))

    def _refuse_strays(self) -> None:
        """Half a layer: transformers would only warn, and make up a weight of random numbers."""
        kinds = tuple({f".{part}" for _, part in self.parts.values() if part != "weight"})
        for name, info in self.checkpoint.tensors.items():
            if name not in self.parts and name.endswith(kinds):
                raise CheckpointError(
                    f"{info.file}: tensor '{name}' is part of a quantised layer, and the tensors "
                    "of no layer go with it"
                )

    def element_size(self, weight: str) -> float | None:
        """Bytes per element of a model's weight as it is stored; None for one of no layer."""
        layer = self._layers.get(weight)
        return None if layer is None else layer.scheme.bits / 8

    def load(self, model: Any, weight: str, parts: dict[str, Tensor]) -> None:
        """Replaces the model's linear layer by the one that the tensors are of."""
        layer = self._layers[weight]
        if self._error is not None:
            return
        try:
            name = weight.removesuffix(".weight")
            old = model.get_submodule(name)
            device = next(iter(parts.values())).device
            in_memory = {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}
            decoded = read_weight(self.checkpoint.with_tensors(in_memory), layer, device)
        except CheckpointError as error:
            # transformers would make a table of it; it is raised at the end instead.
            self._error = error
            return
        linear = make_linear(decoded, None, old.weight.dtype)
        linear.bias = old.bias  # loaded already, or in a moment
        for parameter in linear.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model.set_submodule(name, linear)
        size = sum(parameter.nbytes for parameter in linear.parameters())
        groups = decoded.groups if isinstance(decoded, GroupedWeight) else None
        self._rows[weight] = stored_report(layer, groups, size)

    def finish(self, model: Any) -> list[LayerReport]:
        """The report's rows, in the checkpoint's order. Raises the first error of ``load``."""
        if self._error is not None:
            raise self._error
        for weight, layer in self._layers.items():
            if weight not in self._rows:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: layer '{layer.name}' has not been loaded, because "
                    "its tensors were given other names (key_mapping, or those of the model)"
                )
            # All of a layer's tensors are constants; transformers makes what it loads trainable.
            model.get_submodule(weight.removesuffix(".weight")).requires_grad_(False)
        return [self._rows[weight] for weight in self._layers]


class _LayerConverter(WeightConverter):
    """Collects the tensors of each quantised layer, by name."""

    def __init__(self, reader: _LayerReader) -> None:
        sources = sorted({part for _, part in reader.parts.values()})
        super().__init__(sources, ["weight"], operations=[_Load(reader)])

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        (operation,) = self.operations
        weight, part = operation.reader.parts.get(source_key, (source_key, None))
        self._was_used |= part is not None
        return weight, part


class _Load(ConversionOps):
    """Puts one layer into the model, and so returns no tensors."""

    def __init__(self, reader: _LayerReader) -> None:
        self.reader = reader
        self.hf_quantizer = reader  # for transformers the mark of tensors that it must not cast

    def __deepcopy__(self, memo: dict[int, Any]) -> _Load:
        return self  # transformers copies the converter for each layer

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *args: Any,
        full_layer_name: str,
        model: Any,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parts = {part: tensor for part, (tensor,) in input_dict.items()}
        self.reader.load(model, full_layer_name, parts)
        missing_keys.discard(full_layer_name)
        return {}


def _wanted(method: str) -> bool:
    if quantizer_use() == "missing":
        return not all(available() for available in _NEEDED[method])
    return quantizer_use() == "always"


def _choice(method: str, original: type[QuantizationConfigMixin]) -> type[QuantizationConfigMixin]:
    """The original config class, but of dicts that effllm is to read an ``EffllmConfig``."""

    def from_dict(
        cls: type, config_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> QuantizationConfigMixin:
        if _wanted(method):
            return EffllmConfig(config_dict)
        return original.from_dict(config_dict, *args, **kwargs)

    name = original.__name__
    return type(name, (original,), {"from_dict": classmethod(from_dict), "effllm": original})


def _register() -> None:
    """Again after a reload, it replaces what it has registered before."""
    AUTO_QUANTIZER_MAPPING.pop("effllm", None)
    register_quantizer("effllm")(EffllmQuantizer)
    for method in _NEEDED:
        found = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        original = getattr(found, "effllm", found)
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _choice(method, original)


_register()
