"""Engine options on the command line. Types and defaults come from :class:`~octavo.config.EngineConfig`; here are only
the words: what each field is called, what it means, in which unit, within which limits."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo.config import EngineConfig, SpeculativeConfig
from octavo.errors import ConfigError, PluginError
from octavo.hooks import OptionGroup


@dataclass(frozen=True, slots=True)
class Option:
    """One field's words. ``flags`` replaces the flag that follows from the field's name; ``metavar`` names the value.

    ``default`` is said in the help in place of the dataclass's ``None``.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    default: str | None = None


ENGINE_OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "model": {
        "tokenizer": Option("folder, file or hub name of the tokenizer", default="the model's own"),
        "revision": Option("branch, tag or commit on the hub", default="the main branch"),
        "dtype": Option("of activations and unquantized weights; auto: what the checkpoint and the device do best"),
        "device": Option("torch device, such as cpu or cuda:0; auto: a GPU when there is one"),
        "load_format": Option("auto: read the checkpoint; dummy: random weights, only the configuration is needed"),
        "quantization": Option("weight quantization, by plugin name, such as fp8", default="what the checkpoint says"),
        "hf_overrides": Option("JSON object of entries that replace those of config.json", metavar="JSON"),
        "max_model_len": Option("longest sequence, prompt and output together, in tokens", default="the model's own"),
        "seed": Option("base of the seeds of requests that bring none", default="drawn from the system"),
    },
    "scheduling": {
        "max_num_seqs": Option("sequences that run at once; the others wait"),
        "max_num_batched_tokens": Option("tokens computed in one step", default="2048 on a CPU, 8192 on a GPU"),
        "max_num_partial_prefills": Option("long prompts that share one step's tokens"),
        "scheduling_policy": Option("order of admission, by name; plugins may add some"),
    },
    "memory": {
        "block_size": Option("tokens in one block of the KV cache, a power of two"),
        "num_blocks": Option(
            "blocks of the KV cache", ("--num-blocks", "--num-gpu-blocks"), default="as many as the memory holds"
        ),
        "gpu_memory_utilization": Option("share of the GPU's memory to use, above 0 and at most 1"),
        "cpu_kv_cache_gib": Option("memory for the KV cache on a CPU, in GiB"),
        "kv_cache_dtype": Option("dtype of the KV cache: auto (that of activations) or one that the backend knows"),
        "enable_prefix_caching": Option("keep finished blocks and reuse them for prompts that begin alike"),
        "prefix_cache": Option("implementation of prefix caching, by name", default="that of highest priority"),
    },
    "computation": {
        "attention_backend": Option("attention backend, by name", default="the best that can serve"),
        "kernels": Option(
            "insist on one implementation of an operation; may be repeated", ("--kernel",), "OPERATION=NAME"
        ),
        "overlap": Option("launch a step before the last one is settled", default="on for a GPU"),
        "enforce_eager": Option("no CUDA graphs: starts sooner, decodes slower"),
        "compile_workers": Option(
            "threads that compile kernels side by side at start; 0: one by one, as they are launched",
            default="one for each core, at most 16",
        ),
        "batch_invariant": Option("the same tokens whatever else is in the batch; slower"),
        "num_threads": Option("CPU threads of the engine", ("--threads",), default="torch's own choice"),
        "tensor_parallel_size": Option("devices that share every layer; 1 in this version"),
        "pipeline_parallel_size": Option("devices that hold consecutive layers; 1 in this version"),
    },
    "plugins": {
        "plugins": Option(
            "plugins to use beside the defaults, separated by commas; no:NAME leaves a default out",
            metavar="LIST",
            default="what the checkpoint and the options need",
        ),
        "prefer": Option(
            "which distribution wins when two provide one name; may be repeated", metavar="NAME=DISTRIBUTION"
        ),
    },
}

SPECULATIVE_OPTIONS: Mapping[str, Option] = {
    "method": Option("how tokens are guessed ahead, by name", default="draft-model when a model is named, else off"),
    "model": Option("folder, file or hub name of the draft model", default="none"),
    "num_tokens": Option("guesses for each sequence and step at most, 1 to 32", ("--num-speculative-tokens",)),
    "fixed": Option("always guess that many, instead of as many as pay off"),
    "quantization": Option("weight quantization of the draft model", default="what its checkpoint says"),
    "dtype": Option("of the draft model"),
}

_SPECULATIVE = "speculative_"  # prefix of SpeculativeConfig's fields in the namespace


def engine_parser(plugin_groups: Sequence[tuple[str, OptionGroup]] = ()) -> argparse.ArgumentParser:
    """Every field of EngineConfig and the option groups of plugins, ``(plugin name, group)``, for use as a parent.

    Options that are not given leave nothing in the namespace, so that defaults stand in one place.

    Raises:
        PluginError: a plugin's options collide with others or have destinations outside its own name.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_engine_arguments(parser, [field for options in ENGINE_OPTIONS.values() for field in options])
    group = parser.add_argument_group("speculation")
    for field, option in SPECULATIVE_OPTIONS.items():
        _add(group, SpeculativeConfig, field, option, prefix=_SPECULATIVE)
    destinations: list[str] = []
    for plugin, plugin_group in plugin_groups:
        parser, added = _with_plugin_group(parser, plugin, plugin_group)
        destinations += added
    parser.set_defaults(plugin_destinations=tuple(destinations))
    return parser


def add_engine_arguments(parser: argparse.ArgumentParser, fields: Collection[str]) -> None:
    """MODEL, and these of the fields in :data:`ENGINE_OPTIONS`: for a command that needs a part of a configuration."""
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="folder, file or hub name (default: SmolLM2-135M-Instruct, which comes with Octavo)",
    )
    for title, options in ENGINE_OPTIONS.items():
        group = parser.add_argument_group(title)
        for field, option in options.items():
            if field in fields:
                _add(group, EngineConfig, field, option)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the parsed options describe.

    Raises:
        ConfigError: a value can never work, or an option of the form NAME=VALUE names one thing twice.
    """
    given = vars(args)
    fields = {name: given[name] for options in ENGINE_OPTIONS.values() for name in options if name in given}
    for name in ("kernels", "prefer"):
        if name in fields:
            fields[name] = _mapping(name, fields[name])
    speculative = {name: given[_SPECULATIVE + name] for name in SPECULATIVE_OPTIONS if _SPECULATIVE + name in given}
    return EngineConfig(
        model=given["model"] if "model" in given else _default_model(),
        speculative=SpeculativeConfig(**speculative),
        plugin_options={name: given[name] for name in given.get("plugin_destinations", ())},
        **fields,
    )


def _default_model() -> str:
    from octavo.default_model import find_default_model

    return str(find_default_model())


def engine_options_given(args: argparse.Namespace) -> list[str]:
    """The fields, beside the model, that the command line sets; for commands that may work without an engine."""
    names = [name for options in ENGINE_OPTIONS.values() for name in options]
    names += [_SPECULATIVE + name for name in SPECULATIVE_OPTIONS]
    return [name for name in names if hasattr(args, name)]


def _add(group: Any, config: type, field: str, option: Option, prefix: str = "") -> None:
    """Add one field: its flag, the conversion that its type asks for, and its help with the default."""
    kind, nullable = _kind(config, field)
    default = _default(config, field)
    settings: dict[str, Any] = {"dest": prefix + field, "default": argparse.SUPPRESS}
    said = option.default if default is None else default
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
        said = option.default or ("on" if default else "off")
    elif typing.get_origin(kind) is Literal:
        settings["choices"] = typing.get_args(kind)
    elif field == "hf_overrides":
        settings |= {"type": json_object, "metavar": option.metavar}
        said = None
    elif typing.get_origin(kind) is not None:  # Mapping[str, str]
        settings |= {"type": _pair, "action": "append", "metavar": option.metavar}
        said = None
    else:
        settings |= {"type": kind, "metavar": option.metavar or {int: "N", float: "X"}.get(kind, "NAME")}
    assert default is not None or option.default or not nullable, f"the help of {field} must say what None means"
    flags = option.flags or ("--" + (prefix + field).replace("_", "-"),)
    text = option.help.replace("%", "%%") + (f" (default: {said})" if said is not None else "")
    group.add_argument(*flags, help=text, **settings)


def _with_plugin_group(
    parser: argparse.ArgumentParser, plugin: str, group: OptionGroup
) -> tuple[argparse.ArgumentParser, list[str]]:
    """``parser`` and one plugin's options in a new parser, and the destinations that were added."""
    own = argparse.ArgumentParser(add_help=False)
    try:
        group.add(own.add_argument_group(group.title))
        both = argparse.ArgumentParser(add_help=False, parents=[parser, own])
    except argparse.ArgumentError as error:
        raise PluginError(
            f"plugin '{plugin}' has an option that exists already: {error}. To go on without it: --plugins no:{plugin}"
        ) from error
    destinations = list(vars(own.parse_known_args([])[0]))
    prefix = plugin.replace("-", "_") + "_"
    strange = [name for name in destinations if not name.startswith(prefix)]
    if strange:
        raise PluginError(
            f"plugin '{plugin}' has an option with the destination '{strange[0]}'; destinations must start with "
            f"'{prefix}'. To go on without it: --plugins no:{plugin}"
        )
    return both, destinations


def _kind(config: type, field: str) -> tuple[Any, bool]:
    """A field's type without ``None``, and whether it may be ``None``."""
    hint = typing.get_type_hints(config)[field]
    if isinstance(hint, types.UnionType):
        (kind,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        return kind, True
    return hint, False


def _default(config: type, field: str) -> Any:
    (found,) = (f for f in dataclasses.fields(config) if f.name == field)
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return found.default


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE")
    return name, value


def json_object(text: str) -> dict[str, Any]:
    """An argument's JSON object; raises argparse.ArgumentTypeError when it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is not a JSON object")
    return value


def _mapping(field: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ConfigError(f"{field}: '{name}' is set to both '{found[name]}' and '{value}'; choose one")
    return found
