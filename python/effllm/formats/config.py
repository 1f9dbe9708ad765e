"""What a checkpoint's quantisation config says of each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from effllm.formats.checkpoint import CheckpointError, read_json

SUPPORTED = (
    "AWQ (gemm, 4 bits), GPTQ v1 and v2 (2, 3, 4 or 8 bits) and compressed-tensors "
    "pack-quantized (integers of 2, 3, 4 or 8 bits)"
)

Format = Literal["awq", "gptq", "gptq_v2", "pack-quantized"]


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored.

    Attributes:
        format: "gptq" is version 1.
        bits: of a code.
        group_size: input channels per scale, -1 for all.
        symmetric: whether zero points are in the middle; AWQ and compressed-tensors then may, or
            do, leave them out.
        per_tensor: one scale for the whole weight.
    """

    format: Format
    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool = False


@dataclass(frozen=True)
class QuantConfig:
    """The config of a quantised checkpoint.

    Attributes:
        source: the file it is from, for messages.
        scheme: ``scheme(layer)`` is None where the config leaves the layer unquantised. It raises
            CheckpointError for overrides that are not supported.
    """

    source: Path
    scheme: Callable[[str], Scheme | None]


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
    parsers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}
    if method not in parsers:
        raise reader.unsupported(f"quant_method {method!r}")
    return QuantConfig(source, parsers[method](reader))


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
    sparsity = reader.config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") != "dense"):
        raise reader.unsupported("sparsity_config")
    if reader.config.get("kv_cache_scheme"):
        raise reader.unsupported("kv_cache_scheme")
    groups = reader.inner(reader.config.get("config_groups"), "config_groups").config
    targets: list[tuple[Callable[[str], bool], Scheme]] = []
    for name, value in groups.items():
        group = reader.inner(value, f"config_groups.{name}")
        scheme = _packed_scheme(group, reader.config.get("format"))
        targets += [(_target(reader, target), scheme) for target in group.names("targets")]
    ignore = [_target(reader, name) for name in reader.names("ignore")]

    def scheme_of(layer: str) -> Scheme | None:
        if any(ignored(layer) for ignored in ignore):
            return None
        return next((scheme for matches, scheme in targets if matches(layer)), None)

    return scheme_of


def _packed_scheme(group: _Reader, default_format: Any) -> Scheme:
    name = group.config.get("format") or default_format
    if name != "pack-quantized":
        raise group.unsupported(f"compressed-tensors format {name!r}")
    for key in ("input_activations", "output_activations"):
        if group.config.get(key):
            raise group.unsupported(f"quantised activations ({key})")
    weights = group.inner(group.config.get("weights"), "weights")
    if weights.config.get("type", "int") != "int":
        raise group.unsupported(f"weights of type {weights.config['type']!r}")
    bits = weights.bits("num_bits", allowed=(2, 3, 4, 8))
    strategy = weights.config.get("strategy")
    if strategy not in ("group", "channel", "tensor"):
        raise group.unsupported(f"strategy {strategy!r}")
    scheme = Scheme("pack-quantized", bits, -1, weights.flag("symmetric", default=True))
    if strategy == "group":
        return replace(scheme, group_size=weights.group_size("group_size"))
    return replace(scheme, per_tensor=strategy == "tensor")


def _target(reader: _Reader, target: str) -> Callable[[str], bool]:
    """A name, "re:" and a pattern for the start of a name, or "Linear": every layer."""
    if target.startswith("re:"):
        pattern = reader.pattern(target[3:])
        return lambda layer: pattern.match(layer) is not None
    return lambda layer: target in (layer, "Linear")
