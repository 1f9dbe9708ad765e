"""What a checkpoint's quantisation config says of each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from effllm.formats.checkpoint import CheckpointError, read_json
from effllm.nn.scaled_linear import BLOCK, InputsPer

SUPPORTED = (
    "AWQ (gemm, 4 bits), GPTQ v1 and v2 (2, 3, 4 or 8 bits), compressed-tensors pack-quantized "
    "(integers of 2, 3, 4 or 8 bits), int-, float- and naive-quantized (integers of up to 8 bits, "
    "e4m3), sparse-24-bitmask and sparse-bitmask, fine-grained FP8 (e4m3) and bitsandbytes (nf4, "
    "fp4, int8)"
)

Format = Literal[
    "awq",
    "gptq",
    "gptq_v2",
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "sparse-24-bitmask",
    "sparse-bitmask",
    "fp8",
    "nf4",
    "fp4",
    "llm_int8",
]


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored.

    Attributes:
        format: "gptq" is version 1; "fp8" is the fine-grained one of Hugging Face; "nf4", "fp4" and
            "llm_int8" are those of bitsandbytes.
        bits: of a code.
        group_size: input channels per scale, -1 for all; of "nf4" and "fp4" only the stored tensors
            tell, and it is values of the flattened weight.
        symmetric: whether zero points are in the middle; AWQ and compressed-tensors then may, or
            do, leave them out.
        rows: output channels per scale, -1 for all.
        floats: codes are e4m3 numbers, not integers.
        inputs: what of the layer's inputs has a scale of its own, in e4m3 or int8 as the weight;
            None: they stay as they are, also where they are quantised in a way that no kernel has.
        static: the scale of inputs is stored.
        symmetric_inputs: inputs have no zero points.
    """

    format: Format
    bits: int
    group_size: int
    symmetric: bool
    rows: int = 1
    floats: bool = False
    inputs: InputsPer | None = None
    static: bool = False
    symmetric_inputs: bool = True


@dataclass(frozen=True)
class QuantConfig:
    """The config of a quantised checkpoint.

    Attributes:
        source: the file it is from, for messages.
        scheme: ``scheme(layer)`` is None where the config leaves the layer unquantised. It raises
            CheckpointError for overrides that are not supported.
        sparsity: how those weights are stored that are sparse, quantised or not; None if none is.
    """

    source: Path
    scheme: Callable[[str], Scheme | None]
    sparsity: Literal["sparse-24-bitmask", "sparse-bitmask"] | None = None


def read_config(folder: Path) -> QuantConfig | None:
    """From ``config.json``, or the older ``quantize_config.json`` or ``quant_config.json``.

    Returns None for a checkpoint that is not quantised. Raises CheckpointError for a format that is
    not supported (the message names it and those that are) and for values that make no sense.
    """
    source = folder / "config.json"
    config = read_json(source).get("quantization_config") if source.is_file() else None
    for name in ("quantize_config.json", "quant_config.json"):
        if config is None and (folder / name).is_file():
            source = folder / name
            config = read_json(source)
            config.setdefault("quant_method", "awq" if "w_bit" in config else "gptq")
    return None if config is None else parse_config(source, config)


def parse_config(source: Path, config: Any) -> QuantConfig:
    """From the value of ``quantization_config``, found in the file ``source``.

    Raises CheckpointError; see ``read_config``.
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: quantization_config must be an object, got {config!r}")
    reader = _Reader(source, config)
    method = config.get("quant_method")
    parsers = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "bitsandbytes": _bitsandbytes,
    }
    if not isinstance(method, str) or method not in parsers:
        raise reader.unsupported(f"quant_method {method!r}")
    sparsity = _sparsity(reader) if method == "compressed-tensors" else None
    return QuantConfig(source, parsers[method](reader), sparsity)


class _Reader:
    """Typed look-ups in an untrusted config, with errors that name the file."""

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        self.source = source
        self.config = config

    def inner(self, config: Any, name: str) -> _Reader:
        if not isinstance(config, dict):
            raise self.error(f"{name} must be an object, got {config!r}")
        return _Reader(self.source, config)

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {text}")

    def unsupported(self, what: str) -> CheckpointError:
        return self.error(f"{what} is not supported; effllm reads {SUPPORTED}")

    def bits(self, *keys: str, allowed: tuple[int, ...], default: int | None = None) -> int:
        value = self.first(keys, default)
        if type(value) is not int or value not in allowed:
            raise self.unsupported(f"{keys[0]} = {value!r}")
        return value

    def group_size(self, *keys: str, default: int | None = None) -> int:
        value = self.first(keys, default)
        if type(value) is not int or (value != -1 and value < 1):
            raise self.error(f"{keys[0]} must be -1 or positive, got {value!r}")
        return value

    def pair(self, key: str) -> tuple[int, int]:
        """Rows and columns of a block, as [128, 128] or, in older files, "128x128"."""
        value = self.config.get(key)
        parts = value.split("x") if isinstance(value, str) else value
        if not isinstance(parts, list) or len(parts) != 2:
            parts = [""]
        if not all(re.fullmatch("[1-9][0-9]{0,8}", str(part)) for part in parts):
            raise self.error(f"{key} must be two positive integers, got {value!r}")
        return int(parts[0]), int(parts[1])

    def flag(self, *keys: str, default: bool) -> bool:
        value = self.first(keys, default)
        if not isinstance(value, bool):
            raise self.error(f"{keys[0]} must be true or false, got {value!r}")
        return value

    def names(self, key: str) -> list[str]:
        value = self.config.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(f"{key} must be a list of strings, got {value!r}")
        return value

    def first(self, keys: tuple[str, ...], default: Any) -> Any:
        return next((self.config[key] for key in keys if self.config.get(key) is not None), default)

    def pattern(self, text: str) -> re.Pattern[str]:
        """A regular expression that cannot take for ever.

        A repeated group, or many repetitions in a row, may take exponential time on a name that
        almost matches. Patterns of layer names need neither.
        """
        # "(?:...)?" is once at most.
        repeated_group = re.search(r"\)[*+{]", text)
        if len(text) > 500 or repeated_group or len(re.findall(r"(?<!\\)[*+{]", text)) > 5:
            raise self.error(f"the pattern {text[:100]!r} is too complex: it might take for ever")
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.error(f"the pattern {text!r} is not valid: {error}") from error


def _awq(reader: _Reader) -> Callable[[str], Scheme | None]:
    version = str(reader.first(("version", "format"), "gemm")).lower()
    if version != "gemm":
        raise reader.unsupported(f"AWQ version {version!r}")
    scheme = Scheme(
        "awq",
        reader.bits("bits", "w_bit", allowed=(4,)),
        reader.group_size("group_size", "q_group_size"),
        not reader.flag("zero_point", default=True),
    )
    excluded = reader.names("modules_to_not_convert")
    return lambda layer: None if any(part in layer for part in excluded) else scheme


def _gptq(reader: _Reader) -> Callable[[str], Scheme | None]:
    def parse(config: _Reader, default: Scheme) -> Scheme:
        name = config.first(("checkpoint_format", "format"), default.format)
        if name not in ("gptq", "gptq_v2"):
            raise config.unsupported(f"GPTQ format {name!r}")
        if config.first(("pack_dtype",), "int32") not in ("int32", "torch.int32"):
            raise config.unsupported(f"pack_dtype {config.config['pack_dtype']!r}")
        return Scheme(
            name,
            config.bits("bits", allowed=(2, 3, 4, 8), default=default.bits),
            config.group_size("group_size", default=default.group_size),
            config.flag("sym", default=default.symmetric),
        )

    # Bits and group size have no default: 0 is refused.
    base = parse(reader, Scheme("gptq", 0, 0, True))
    excluded = reader.names("modules_to_not_convert")
    # The first pattern that matches decides: "-:" leaves the layer alone, "+:" or nothing in front
    # overrides values of the whole file.
    rules: list[tuple[re.Pattern[str], Scheme | None]] = []
    dynamic = reader.inner(reader.config.get("dynamic") or {}, "dynamic")
    for key, overrides in dynamic.config.items():
        text = key[2:] if key[:2] in ("+:", "-:") else key
        scheme = None
        if not key.startswith("-:"):
            scheme = parse(reader.inner(overrides, f"dynamic[{key!r}]"), base)
        rules.append((reader.pattern(text), scheme))

    def scheme_of(layer: str) -> Scheme | None:
        for pattern, scheme in rules:
            if pattern.match(layer):
                return scheme
        return None if any(part in layer for part in excluded) else base

    return scheme_of


def _compressed_tensors(reader: _Reader) -> Callable[[str], Scheme | None]:
    if reader.config.get("transform_config"):
        raise reader.unsupported("transform_config (rotated weights)")
    if reader.config.get("kv_cache_scheme"):
        raise reader.unsupported("kv_cache_scheme")
    # A model that is only sparse has none.
    groups = reader.config.get("config_groups")
    if groups is None and reader.config.get("sparsity_config"):
        groups = {}
    groups = reader.inner(groups, "config_groups").config
    targets: list[tuple[Callable[[str], bool], Scheme]] = []
    for name, value in groups.items():
        group = reader.inner(value, f"config_groups.{name}")
        scheme = _group_scheme(group, reader.config.get("format"))
        targets += [(_target(reader, target), scheme) for target in group.names("targets")]
    ignore = [_target(reader, name) for name in reader.names("ignore")]

    def scheme_of(layer: str) -> Scheme | None:
        if any(ignored(layer) for ignored in ignore):
            return None
        return next((scheme for matches, scheme in targets if matches(layer)), None)

    return scheme_of


def _sparsity(reader: _Reader) -> Any:
    if not reader.config.get("sparsity_config"):
        return None
    name = reader.inner(reader.config["sparsity_config"], "sparsity_config").config.get("format")
    if name not in ("dense", "sparse-24-bitmask", "sparse-bitmask"):
        raise reader.unsupported(f"sparsity_config of format {name!r}")
    return None if name == "dense" else name


# What compressed-tensors stores a byte per code of; activations may be quantised too, at run time
# or with scales of their own.
_PLAIN = ("float-quantized", "int-quantized", "naive-quantized")


def _group_scheme(group: _Reader, default_format: Any) -> Scheme:
    name = group.config.get("format") or default_format
    if name != "pack-quantized" and name not in _PLAIN:
        raise group.unsupported(f"compressed-tensors format {name!r}")
    refused = ["output_activations"] + ["input_activations"] * (name not in _PLAIN)
    for key in refused:
        if group.config.get(key):
            raise group.unsupported(f"quantised activations ({key})")
    weights = group.inner(group.config.get("weights"), "weights")
    kind = weights.config.get("type", "int")
    floats = name in _PLAIN and kind == "float"
    if kind != "int" and not floats:
        raise group.unsupported(f"weights of type {kind!r}")
    allowed: tuple[int, ...] = (2, 3, 4, 8)
    if name in _PLAIN:
        allowed = (8,) if floats else tuple(range(1, 9))
    bits = weights.bits("num_bits", allowed=allowed)
    symmetric = weights.flag("symmetric", default=True)
    if floats and not symmetric:
        raise group.unsupported("a zero point of e4m3 weights")
    rows, columns = _blocks(weights, name)
    scheme = Scheme(name, bits, columns, symmetric, rows, floats)
    if bits != 8 or name not in _PLAIN:
        return scheme
    inputs, static, symmetric_inputs = _inputs(group, kind)
    return replace(scheme, inputs=inputs, static=static, symmetric_inputs=symmetric_inputs)


def _inputs(group: _Reader, kind: str) -> tuple[InputsPer | None, bool, bool]:
    """What the kernels do of inputs quantised as such weights are, "float" or "int": the scheme's
    ``inputs``, ``static`` and ``symmetric_inputs``."""
    args = group.inner(group.config.get("input_activations") or {}, "input_activations").config
    nothing = (None, False, True)
    if args.get("type", "int") != kind or args.get("num_bits") != 8:
        return nothing
    strategy, dynamic = args.get("strategy"), args.get("dynamic", False)
    if not args.get("symmetric", True):
        known = kind == "int" and strategy == "token" and dynamic is True
        return ("token", False, False) if known else nothing
    if strategy == "tensor" and dynamic is False:
        return "tensor", True, True
    kinds: dict[Any, InputsPer] = {"token": "token"}
    if kind == "float":
        kinds["tensor"] = "tensor"
        if args.get("group_size") == BLOCK:
            kinds["group"] = "group"
    return (kinds.get(strategy), False, True) if dynamic is True else nothing


def _blocks(weights: _Reader, format: str) -> tuple[int, int]:
    """Output and input channels per scale."""
    strategy = weights.config.get("strategy")
    if strategy == "group":
        return 1, weights.group_size("group_size")
    if strategy == "block" and format in _PLAIN:
        return weights.pair("block_structure")
    if strategy not in ("channel", "tensor"):
        raise weights.unsupported(f"strategy {strategy!r}")
    return (1 if strategy == "channel" else -1), -1


def _fp8(reader: _Reader) -> Callable[[str], Scheme | None]:
    if reader.first(("fmt",), "e4m3") != "e4m3":
        raise reader.unsupported(f"FP8 of fmt {reader.config['fmt']!r}")
    if reader.first(("expert_dtype",), "fp8") != "fp8":
        raise reader.unsupported(f"expert_dtype {reader.config['expert_dtype']!r}")
    rows = columns = -1
    if reader.config.get("weight_block_size") is not None:
        rows, columns = reader.pair("weight_block_size")
    scheme = Scheme("fp8", 8, columns, True, rows, floats=True)
    if reader.config.get("activation_scheme") == "static" and rows == -1:
        scheme = replace(scheme, inputs="tensor", static=True)
    elif (rows, columns) == (BLOCK, BLOCK):
        scheme = replace(scheme, inputs="group")
    return lambda layer: scheme  # the dtype of a weight tells whether it is quantised


def _bitsandbytes(reader: _Reader) -> Callable[[str], Scheme | None]:
    if reader.flag("load_in_4bit", "_load_in_4bit", default=False):
        name = reader.first(("bnb_4bit_quant_type",), "fp4")
        if name not in ("nf4", "fp4"):
            raise reader.unsupported(f"bnb_4bit_quant_type {name!r}")
        scheme = Scheme(name, 4, -1, True)
    elif reader.flag("load_in_8bit", "_load_in_8bit", default=False):
        scheme = Scheme("llm_int8", 8, -1, True)
    else:
        raise reader.unsupported("bitsandbytes without load_in_4bit or load_in_8bit")
    return lambda layer: scheme  # as with FP8


def _target(reader: _Reader, target: str) -> Callable[[str], bool]:
    """A name, "re:" and a pattern for the start of a name, or "Linear": every layer."""
    if target.startswith("re:"):
        pattern = reader.pattern(target[3:])
        return lambda layer: pattern.match(layer) is not None
    return lambda layer: target in (layer, "Linear")
