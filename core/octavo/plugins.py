"""The plugin host: the only file that touches pluggy's manager.

Discovery reads metadata only; a plugin is imported when it is selected. Selection is resolved once, in the process
that the user started, into a manifest that every other process must reproduce.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pluggy

from octavo.errors import ConfigError, PluginError
from octavo.hooks import (
    API_VERSION,
    CAPABILITIES,
    ENTRY_POINT_GROUP,
    PROJECT,
    Hooks,
    KernelProvider,
    PluginInfo,
    Provider,
)

if TYPE_CHECKING:
    from octavo.config import EngineConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = TypeVar("P", bound=Provider)

DEFAULT_PLUGINS = ("models", "gguf", "cpu", "triton", "prefix-cache", "quantize")
"""What serves the default model, whatever else ``--plugins`` lists. Selected unless ``--plugins no:NAME`` leaves one
out; one that is not installed is simply not there."""


CALLED_WITH_ARGUMENTS = frozenset({"octavo_check_config", "octavo_request_finished", "octavo_step_finished"})
"""Hooks that are told something; all others are asked for something."""


class PluginRecord(msgspec.Struct, frozen=True, order=True):
    """A plugin as its distribution's metadata describes it; nothing is imported to know this."""

    name: str
    distribution: str
    version: str
    module: str


Manifest = tuple[PluginRecord, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """What ``--plugins`` says: the names it lists, and the defaults it leaves out."""

    listed: tuple[str, ...] | None = None  # None: nothing was listed, so what is needed is activated by itself
    excluded: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Selection:
        """``"awq,no:triton"`` -> listed awq, excluded triton. Only exclusions: the rest is still automatic.

        Raises:
            PluginError: a name is empty or both listed and excluded.
        """
        if text is None:
            return cls()
        listed: list[str] = []
        excluded: list[str] = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            name = item.removeprefix("no:")
            if not name:
                raise PluginError(f"--plugins {text}: 'no:' must be followed by a plugin's name, as in no:triton")
            (excluded if item.startswith("no:") else listed).append(name)
        both = sorted(set(listed) & set(excluded))
        if both:
            raise PluginError(f"--plugins {text}: {', '.join(both)} is both selected and left out")
        only_exclusions = not listed and bool(excluded)
        return cls(None if only_exclusions else tuple(listed), tuple(excluded))


def discover() -> dict[str, list[PluginRecord]]:
    """Every installed plugin by name, from entry-point metadata; a name claimed twice has two records."""
    found: dict[str, list[PluginRecord]] = {}
    for distribution in importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group != ENTRY_POINT_GROUP:
                continue
            record = PluginRecord(entry.name, distribution.metadata["Name"], distribution.version, entry.value)
            records = found.setdefault(entry.name, [])
            if record not in records:  # a path that is listed twice shows the same distribution twice
                records.append(record)
    return {name: sorted(found[name]) for name in sorted(found)}


def select(
    selection: Selection,
    needed: Mapping[str, str],
    *,
    installed: Mapping[str, Sequence[PluginRecord]] | None = None,
    prefer: Mapping[str, str] | None = None,
) -> Manifest:
    """Which plugins take part.

    ``needed`` maps a plugin's name to the reason it is needed ("the checkpoint's quant_method is awq"). Without a list
    it is activated and logged; with a list that lacks it, the error prints the exact option to use.

    Raises:
        PluginError: a name is not installed, claimed by two distributions, left out although needed, or not listed.
    """
    installed = discover() if installed is None else installed
    prefer = prefer or {}
    defaults = [name for name in DEFAULT_PLUGINS if name in installed and name not in selection.excluded]
    names = list(dict.fromkeys([*defaults, *(selection.listed or ())]))
    for name, reason in needed.items():
        if name in selection.excluded:
            raise PluginError(f"plugin '{name}' is needed ({reason}) but left out; remove no:{name} from --plugins")
        if name in names:
            continue
        if selection.listed is not None:
            option = ",".join([*selection.listed, *(f"no:{x}" for x in selection.excluded), name])
            raise PluginError(f"plugin '{name}' is needed ({reason}) but not listed; use --plugins {option}")
        logger.info("activating plugin '%s': %s", name, reason)
        names.append(name)
    for name in selection.excluded:
        if name not in installed:
            raise PluginError(f"--plugins no:{name}: no such plugin; installed: {', '.join(installed) or 'none'}")
    return tuple(_pick(name, installed, prefer, needed.get(name)) for name in names)


def _pick(
    name: str, installed: Mapping[str, Sequence[PluginRecord]], prefer: Mapping[str, str], reason: str | None
) -> PluginRecord:
    records = installed.get(name, ())
    if not records:
        why = f" ({reason})" if reason else ""
        raise PluginError(
            f"plugin '{name}'{why} is not installed; installed: {', '.join(installed) or 'none'}. "
            f"Install the package that provides it, or see 'octavo plugins list'"
        )
    if len(records) == 1:
        return records[0]
    claimants = ", ".join(f"{record.distribution} {record.version}" for record in records)
    if name in prefer:
        chosen = [record for record in records if record.distribution == prefer[name]]
        if chosen:
            return chosen[0]
        raise PluginError(f"--prefer {name}={prefer[name]}: plugin '{name}' is provided by {claimants}")
    raise PluginError(
        f"plugin '{name}' is provided by {claimants}; choose with --prefer {name}={records[0].distribution}"
    )


class PluginHost:
    """The selected plugins, imported, validated and frozen: typed methods in front of the hooks."""

    def __init__(self, manifest: Manifest, *, prefer: Mapping[str, str] | None = None) -> None:
        """Import and validate every plugin of ``manifest``.

        Raises:
            PluginError: names the plugin, its distribution and the option that leaves it out.
        """
        self.manifest = manifest
        self.infos: dict[str, PluginInfo] = {}
        self.seconds: dict[tuple[str, str], float] = {}  # (plugin, hook) -> time spent, for metrics
        self._prefer = dict(prefer or {})
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Hooks)
        self._distribution = {record.name: record.distribution for record in manifest}
        for record in manifest:
            module = self._import(record)
            self.infos[record.name] = self._validate(record, module)
            self._register(record, module)
        self._check_combinations()
        self._cache: dict[str, Mapping[str, Any]] = {}

    @classmethod
    def reproduce(cls, manifest: Manifest, *, prefer: Mapping[str, str] | None = None) -> PluginHost:
        """The same plugins in another process.

        Raises:
            PluginError: this process finds another version, or none; says the difference.
        """
        installed = discover()
        for record in manifest:
            here = installed.get(record.name, [])
            if record not in here:
                found = ", ".join(f"{r.distribution} {r.version} ({r.module})" for r in here) or "nothing"
                raise PluginError(
                    f"the engine process cannot reproduce plugin '{record.name}': expected {record.distribution} "
                    f"{record.version} ({record.module}), found {found}"
                )
        return cls(manifest, prefer=prefer)

    # --- what plugins provide ---------------------------------------------------------------------------------------

    def models(self) -> Mapping[str, Provider]:
        """Architecture name to model class."""
        return self._providers("octavo_models", Provider, _name)

    def weight_formats(self) -> Mapping[str, Provider]:
        """Format name to class."""
        return self._providers("octavo_weight_formats", Provider, _name)

    def quantizations(self) -> Mapping[str, Provider]:
        """``quant_method`` to class."""
        return self._providers("octavo_quantizations", Provider, _name)

    def attention_backends(self) -> Mapping[str, Provider]:
        """Backend name to class."""
        return self._providers("octavo_attention_backends", Provider, _name)

    def prefix_caches(self) -> Mapping[str, Provider]:
        """Name to class."""
        return self._providers("octavo_prefix_caches", Provider, _name)

    def scheduling_policies(self) -> Mapping[str, Provider]:
        """Name to class."""
        return self._providers("octavo_scheduling_policies", Provider, _name)

    def drafters(self) -> Mapping[str, Provider]:
        """Method name to class."""
        return self._providers("octavo_drafters", Provider, _name)

    def logits_processors(self) -> Mapping[str, Provider]:
        """Name to class."""
        return self._providers("octavo_logits_processors", Provider, _name)

    def kernel_compilers(self) -> Mapping[str, Provider]:
        """Compiler name to class."""
        return self._providers("octavo_kernel_compilers", Provider, _name)

    def kernels(self) -> Mapping[str, KernelProvider]:
        """``"operation/name"`` to implementation."""
        return self._providers("octavo_kernels", KernelProvider, lambda kernel: f"{kernel.operation}/{kernel.name}")

    def kernel_benchmarks(self) -> Mapping[str, Provider]:
        """Operation to what makes its cases."""
        return self._providers("octavo_kernel_benchmarks", Provider, _name)

    def items(self, hook: str) -> list[tuple[str, Any]]:
        """``(plugin name, item)`` of a hook that returns sequences (options, routes, metrics)."""
        return [(name, item) for name, result in self._call(hook, Sequence) for item in result]

    def mappings(self, hook: str) -> dict[str, Any]:
        """The merged result of a hook that returns mappings (commands); a key claimed twice is an error."""
        return self._decide(
            hook, ((p, key, value) for p, result in self._call(hook, Mapping) for key, value in result.items())
        )

    def check_config(self, config: EngineConfig) -> None:
        """Let every plugin refuse the resolved configuration.

        Raises:
            ConfigError: a plugin's own.
            PluginError: a plugin failed in another way; names it.
        """
        for plugin, function in self._implementations("octavo_check_config"):
            try:
                function(config)
            except ConfigError:
                raise
            except Exception as error:
                raise self._failed(plugin, "octavo_check_config", error) from error

    def observers(self, hook: str) -> Callable[..., None] | None:
        """A function that tells every observer, or None when nobody listens."""
        implementations = self._implementations(hook)
        return _Observers(hook, implementations, self.seconds) if implementations else None

    def provided_by(self, plugin: str) -> dict[str, list[str]]:
        """Hook to the names that one plugin provides through it; for people."""
        return {
            hook: [item if isinstance(item, str) else _label(item) for item in result]
            for hook in sorted(self._hook_names() - CALLED_WITH_ARGUMENTS)
            for name, result in self._call(hook, (Sequence, Mapping))
            if name == plugin
        }

    # --- validation -------------------------------------------------------------------------------------------------

    def _import(self, record: PluginRecord) -> ModuleType:
        try:
            return importlib.import_module(record.module)
        except Exception as error:
            raise self._broken(record.name, f"cannot be imported: {type(error).__name__}: {error}") from error

    def _validate(self, record: PluginRecord, module: ModuleType) -> PluginInfo:
        info = getattr(module, "plugin", None)
        if not isinstance(info, PluginInfo):
            raise self._broken(record.name, f"module {record.module} has no 'plugin = PluginInfo(…)'")
        low, high = info.api
        if not low <= API_VERSION <= high:
            raise self._broken(
                record.name, f"supports plugin API {low} to {high}, but this Octavo has API {API_VERSION}"
            )
        return info

    def _register(self, record: PluginRecord, module: ModuleType) -> None:
        """Every function called like a hook must be one, marked as one, with arguments that the hook has."""
        known = self._hook_names()
        functions = {
            name: function
            for name, function in vars(module).items()
            if name.startswith(f"{PROJECT}_") and isinstance(function, FunctionType)
        }
        for name in functions:
            options = self._manager.parse_hookimpl_opts(module, name)
            if name not in known and options is not None:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise self._broken(record.name, f"implements an unknown hook {name}; {hint}")
            if name in known and options is None:
                raise self._broken(record.name, f"defines {name} without @hookimpl, so it would never be called")
            if options is not None and (options["wrapper"] or options["hookwrapper"]):
                raise self._broken(record.name, f"wraps {name}; hooks can be implemented, not wrapped")
        try:
            self._manager.register(module, name=record.name)
        except pluggy.PluginValidationError as error:
            raise self._broken(record.name, f"does not fit its hook: {' '.join(str(error).split())}") from error

    def _check_combinations(self) -> None:
        names = {record.name for record in self.manifest}
        for name, info in self.infos.items():
            clash = sorted(set(info.incompatible) & names)
            if clash:
                raise PluginError(
                    f"plugin '{name}' does not work with plugin '{clash[0]}'; leave one out with "
                    f"--plugins no:{name} or --plugins no:{clash[0]}"
                )

    def check_capabilities(self, used: Iterable[str]) -> None:
        """Refuse a configuration that uses what a selected plugin does not work with.

        Raises:
            PluginError: names the plugin and the capability.
        """
        for capability in used:
            for name, info in self.infos.items():
                if capability in info.incompatible:
                    raise PluginError(
                        f"plugin '{name}' does not work with {capability}; switch that off or use --plugins no:{name}"
                    )

    def matrix(self) -> dict[str, dict[str, bool]]:
        """Plugin to capability to whether they work together."""
        return {
            name: {capability: capability not in info.incompatible for capability in CAPABILITIES}
            for name, info in self.infos.items()
        }

    # --- calling ----------------------------------------------------------------------------------------------------

    def _hook_names(self) -> set[str]:
        return {name for name in vars(Hooks) if name.startswith(f"{PROJECT}_")}

    def _implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """``(plugin name, function)`` in the order of selection; each takes all of the hook's arguments."""
        found = {impl.plugin_name: impl for impl in getattr(self._manager.hook, hook).get_hookimpls()}
        return [
            (record.name, _taking_all(found[record.name].function, len(found[record.name].argnames)))
            for record in self.manifest
            if record.name in found
        ]

    def _call(self, hook: str, kind: type | tuple[type, ...]) -> list[tuple[str, Any]]:
        """``(plugin name, result)`` in the order of selection; each result is of ``kind``."""
        results = []
        for plugin, function in self._implementations(hook):
            started = time.perf_counter()
            try:
                result = function()
            except Exception as error:
                raise self._failed(plugin, hook, error) from error
            self.seconds[plugin, hook] = time.perf_counter() - started
            if not isinstance(result, kind) or isinstance(result, str):
                kinds = " or ".join(k.__name__.lower() for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise self._broken(plugin, f"returns a {type(result).__name__} from {hook}, which must be a {kinds}")
            results.append((plugin, result))
        return results

    def _providers(self, hook: str, kind: type[P], key: Callable[[P], str]) -> Mapping[str, P]:
        if hook not in self._cache:
            claims: list[tuple[str, str, P]] = []
            for plugin, result in self._call(hook, Sequence):
                for provider in result:
                    if not isinstance(provider, kind):
                        raise self._broken(
                            plugin, f"must return {kind.__name__} records from {hook}, not {type(provider).__name__}"
                        )
                    claims.append((plugin, key(provider), provider))
            self._cache[hook] = MappingProxyType(self._decide(hook, claims))
        return self._cache[hook]

    def _decide(self, hook: str, claims: Iterable[tuple[str, str, T]]) -> dict[str, T]:
        """Name to value, from ``(plugin, name, value)``: what two distributions claim goes to the preferred one."""
        claimants: dict[str, dict[str, T]] = {}
        for plugin, name, value in claims:
            values = claimants.setdefault(name, {})
            if plugin in values:
                raise self._broken(plugin, f"provides '{name}' twice in {hook}")
            values[plugin] = value
        return {name: self._preferred(hook, name, values) for name, values in claimants.items()}

    def _preferred(self, hook: str, name: str, values: Mapping[str, T]) -> T:
        first, *others = values.values()
        if all(value == first for value in others):  # plugins that share an implementation all name it
            return first
        chosen = [value for plugin, value in values.items() if self._distribution[plugin] == self._prefer.get(name)]
        if chosen and all(value == chosen[0] for value in chosen):
            return chosen[0]
        claimants = " and by ".join(f"plugin '{plugin}' of {self._distribution[plugin]}" for plugin in values)
        distributions = {self._distribution[plugin] for plugin in values}
        if len(distributions) < len(values):
            remedy = f"leave one out with --plugins no:{list(values)[-1]}"
        else:
            remedy = f"choose with --prefer {name}={self._distribution[next(iter(values))]}"
        raise PluginError(f"'{name}' ({hook}) is provided by {claimants}; {remedy}")

    def _failed(self, plugin: str, hook: str, error: Exception) -> PluginError:
        return self._broken(plugin, f"failed in {hook}: {type(error).__name__}: {error}")

    def _broken(self, name: str, what: str) -> PluginError:
        record = next(record for record in self.manifest if record.name == name)
        return PluginError(
            f"plugin '{name}' of {record.distribution} {record.version} {what}. "
            f"To go on without it: --plugins no:{name}"
        )


class _Observers:
    """Tells observers, times them, and switches off the one that fails."""

    def __init__(
        self,
        hook: str,
        implementations: list[tuple[str, Callable[..., None]]],
        seconds: dict[tuple[str, str], float],
    ) -> None:
        self._hook = hook
        self._implementations = implementations
        self._seconds = seconds

    def __call__(self, argument: Any) -> None:
        for name, function in list(self._implementations):
            started = time.perf_counter()
            try:
                function(argument)
            except Exception:
                logger.exception("plugin '%s' failed in %s and is switched off", name, self._hook)
                self._implementations.remove((name, function))
            spent = time.perf_counter() - started
            self._seconds[name, self._hook] = self._seconds.get((name, self._hook), 0.0) + spent


def _taking_all(function: Callable[..., Any], num_arguments: int) -> Callable[..., Any]:
    """``function`` without its further arguments: an implementation may take fewer than its hook offers."""
    return lambda *arguments: function(*arguments[:num_arguments])  # no hook offers more than one


def _name(provider: Provider) -> str:
    return provider.name


def _label(item: Any) -> str:
    if isinstance(item, KernelProvider):
        return f"{item.operation}/{item.name}"
    return str(getattr(item, "name", None) or getattr(item, "title", None) or type(item).__name__)
