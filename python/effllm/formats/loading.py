"""effllm.load: a checkpoint folder, quantised or not, into a transformers model of our layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from effllm.formats.checkpoint import FLOATS, Checkpoint, CheckpointError, read_json
from effllm.formats.config import read_config
from effllm.formats.empty import empty_model, finish_model, import_extra
from effllm.formats.gguf_model import is_gguf, load_gguf
from effllm.formats.grouped import GroupedWeight
from effllm.formats.layers import StoredLayer, checked_linear, find_layers, unused_scales
from effllm.formats.reading import read_bias, read_weight
from effllm.formats.report import LayerReport, model_report, stored_report
from effllm.formats.weights import make_linear

# Llama checkpoints of old have these; they follow from the config.
_NEVER_NEEDED = re.compile(r"rotary_emb\.inv_freq$")


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Loads a causal language model whose quantised layers run on our kernels.

    Reads AWQ (gemm), GPTQ v1 and v2, compressed-tensors (pack-, float-, int- and naive-quantized,
    sparse with bit masks), fine-grained FP8, bitsandbytes (NF4, FP4, int8), and GGUF files
    (llama, qwen2, qwen3, gemma, gemma2); checkpoints that are not quantised load as transformers
    loads them. Weights go from the file to the kernels' layout one layer at a time.
    ``model.effllm_report`` says what each layer is and what runs it: 2- and 3-bit codes become
    4-bit codes exactly, and so do GGUF's Q4_0 and the Q4_1 that allow it; its Q8_0, Q4_K and Q6_K
    keep their blocks (``GgufLinear``); NF4 and FP4 keep their codes and codebook; e4m3 codes stay
    what they are where scales are per tensor, channel or 128 x 128; all else, integers of 8 bits
    and groups that the kernels do not take among it, is expanded to dense layers. Beside e4m3
    weights inputs are rounded to e4m3 as the config says; others are never quantised, whatever it
    says of them.

    A model with packed layers is saved by ``effllm.save``; its ``save_pretrained`` raises.

    Args:
        path: a folder with ``config.json`` and safetensors files, or a file ``*.gguf``.
        device: where the weights go; they are decoded there.
        dtype: of all that is not quantised; by default that of the config, or bfloat16. Scales
            keep the dtype that they are stored in.
        progress: show a progress bar.
        **options: for ``from_config`` of transformers, ``attn_implementation="effllm"`` say.

    Returns:
        The model, in evaluation mode.

    Raises:
        ImportError: transformers is missing (``pip install 'effllm[hf]'``).
        FileNotFoundError: no such folder, or no safetensors file in it.
        CheckpointError: an unsupported format, or a file that is damaged, incomplete or
            contradicts the config or the model. The message names file, tensor, found and needed.
    """
    if is_gguf(path):
        return load_gguf(path, torch.device(device), dtype, progress, options)
    checkpoint = Checkpoint(path)
    quant_config = read_config(checkpoint.folder)
    stored = find_layers(checkpoint, quant_config)
    if quant_config is not None and not stored:
        raise CheckpointError(
            f"{quant_config.source}: quantised layers are needed, the tensors are of none"
        )
    transformers = import_extra("transformers")
    config = _model_config(transformers, checkpoint.folder)
    dtype = dtype or _default_dtype(config)
    _refuse_endless(config, checkpoint)
    if not stored:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:
            # transformers would go on with random numbers.
            name = min(info["missing_keys"])
            raise CheckpointError(f"{checkpoint.folder}: tensor '{name}' is missing")
        model.to(device)
        return finish_model(model, model_report(model, []))

    # The loaded model is no longer what the file's config describes.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(config, str(checkpoint.folder / "config.json"), dtype, options)
    filler = _Filler(model, checkpoint, torch.device(device), dtype)
    rows = [filler.fill_layer(layer) for layer in filler.watch(stored.values(), progress)]
    filler.fill_rest()
    filler.used.update(unused_scales(checkpoint, quant_config))
    filler.refuse_leftovers()
    generation_config = checkpoint.folder / "generation_config.json"
    if generation_config.is_file():
        read_json(generation_config)
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(path))
    return finish_model(model, model_report(model, rows))


def _refuse_endless(config: Any, checkpoint: Checkpoint) -> None:
    """Building a billion layers would take for ever, only to find out that they are missing."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: num_hidden_layers must be at most the number of "
            f"tensors, {len(checkpoint.tensors)}, got {layers}"
        )


class _Filler:
    """Fills a model on the meta device, and keeps account of the tensors that it has used."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.used: set[str] = set()

    def watch(self, layers: Any, progress: bool) -> Any:
        """The layers, with a progress bar."""
        return tqdm(layers, desc="load", unit="layer", leave=False, disable=not progress)

    def fill_layer(self, stored: StoredLayer) -> LayerReport:
        """Replaces one linear layer by a filled one."""
        name, checkpoint = stored.name, self.checkpoint
        module = checked_linear(self.model, stored, checkpoint)
        weight = read_weight(checkpoint, stored, self.device)
        self.used.update(stored.tensors(checkpoint))
        bias = read_bias(checkpoint, name, module, self.device)
        self.used.add(f"{name}.bias")
        linear = make_linear(weight, None if bias is None else bias.to(self.dtype), self.dtype)
        if self.model.get_output_embeddings() is module:
            # A packed head is nobody's embedding, whatever the config said.
            self.model.config.tie_word_embeddings = False
        self.model.set_submodule(name, linear)
        size = sum(p.nbytes for p in linear.parameters())
        groups = weight.groups if isinstance(weight, GroupedWeight) else None
        return stored_report(stored, groups, size)

    def fill_rest(self) -> None:
        """Fills what is not quantised; parameters that share memory are filled once."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.is_meta:
                names.setdefault(id(parameter), []).append(name)
        for shared in names.values():
            self._fill_parameter(shared)
        self._fill_buffers()

    def _fill_parameter(self, names: list[str]) -> None:
        meta = self.model.get_parameter(names[0])
        present = [name for name in names if name in self.checkpoint.tensors]
        # With none there, the first is the one that the message misses.
        tensors = [self._read(name, meta) for name in present or names[:1]]
        if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensors {', '.join(present)} must be equal, because "
                "the config ties them, got different values"
            )
        parameter = nn.Parameter(tensors[0], requires_grad=meta.requires_grad)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, parameter)

    def _fill_buffers(self) -> None:
        persistent = self.model.state_dict().keys()
        for name, buffer in list(self.model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            value = self._read(name, buffer) if name in persistent else buffer.to(self.device)
            setattr(self.model.get_submodule(owner), attribute, value)

    def _read(self, name: str, needed: Tensor) -> Tensor:
        self.used.add(name)
        dtypes = FLOATS if needed.is_floating_point() else None
        tensor = self.checkpoint.read(name, needed.shape, dtypes, self.device)
        return tensor.to(self._dtype_of(name) if needed.is_floating_point() else needed.dtype)

    def _dtype_of(self, name: str) -> torch.dtype:
        """Models name modules that must stay in fp32, some of them only beside fp16."""
        kept = list(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            kept += getattr(self.model, "_keep_in_fp32_modules", None) or ()
        parts = name.split(".")
        return torch.float32 if any(part in parts for part in kept) else self.dtype

    def refuse_leftovers(self) -> None:
        """A tensor that nobody takes is a model that computes something else."""
        ignored = [re.compile(p) for p in self.model._keys_to_ignore_on_load_unexpected or ()]
        ignored.append(_NEVER_NEEDED)
        left = [
            name
            for name in self.checkpoint.tensors
            if name not in self.used and not any(p.search(name) for p in ignored)
        ]
        if left:
            file = self.checkpoint.tensors[left[0]].file
            raise CheckpointError(
                f"{file}: tensor '{left[0]}' and {len(left) - 1} others belong to no layer of "
                f"{type(self.model).__name__}"
            )


def _model_config(transformers: Any, folder: Path) -> Any:
    source = folder / "config.json"
    if not source.is_file():
        raise CheckpointError(f"{source}: the file is missing")
    read_json(source)
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a class per model, each with its own checks
        raise CheckpointError(
            f"{source}: not a config that transformers takes: {type(error).__name__}: {error}"
        ) from error


def _default_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2:
        return dtype
    return torch.bfloat16
