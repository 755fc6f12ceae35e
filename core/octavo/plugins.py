"""The plugin host: the only file that touches pluggy's manager.

Discovery reads metadata only; a plugin is imported when it is selected. Selection is resolved once, in the process
that the user started, into a manifest that every other process must reproduce.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec
import pluggy

from octavo.errors import PluginError
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

logger = logging.getLogger(__name__)

DEFAULT_PLUGINS = ("models", "cpu", "triton", "prefix-cache", "quantize")
"""Selected unless ``--plugins no:NAME`` leaves one out; one that is not installed is simply not there."""


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
            self._manager.register(module, name=record.name)
        self._check_hooks()
        self._check_combinations()
        self._cache: dict[str, dict[str, Provider]] = {}

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

    def models(self) -> dict[str, Provider]:
        """Architecture name to model class."""
        return self._providers("octavo_models")

    def weight_formats(self) -> dict[str, Provider]:
        """Format name to class."""
        return self._providers("octavo_weight_formats")

    def quantizations(self) -> dict[str, Provider]:
        """``quant_method`` to class."""
        return self._providers("octavo_quantizations")

    def attention_backends(self) -> dict[str, Provider]:
        """Backend name to class."""
        return self._providers("octavo_attention_backends")

    def prefix_caches(self) -> dict[str, Provider]:
        """Name to class."""
        return self._providers("octavo_prefix_caches")

    def scheduling_policies(self) -> dict[str, Provider]:
        """Name to class."""
        return self._providers("octavo_scheduling_policies")

    def drafters(self) -> dict[str, Provider]:
        """Method name to class."""
        return self._providers("octavo_drafters")

    def logits_processors(self) -> dict[str, Provider]:
        """Name to class."""
        return self._providers("octavo_logits_processors")

    def kernels(self) -> dict[str, KernelProvider]:
        """``"operation/name"`` to implementation."""
        found = self._providers("octavo_kernels", key=lambda provider: f"{provider.operation}/{provider.name}")
        return {name: provider for name, provider in found.items() if isinstance(provider, KernelProvider)}

    def items(self, hook: str) -> list[tuple[str, Any]]:
        """``(plugin name, item)`` of a hook that returns sequences (options, routes, metrics)."""
        return [(name, item) for name, result in self._call(hook) for item in result]

    def mappings(self, hook: str) -> dict[str, Any]:
        """The merged result of a hook that returns mappings (commands); a key claimed twice is an error."""
        merged: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for plugin, result in self._call(hook):
            for name, value in result.items():
                if name in owners:
                    raise self._claimed_twice(hook, name, owners[name], plugin)
                owners[name] = plugin
                merged[name] = value
        return merged

    def check_config(self, config: Any) -> None:
        """Let every plugin refuse the resolved configuration."""
        self._manager.hook.octavo_check_config(config=config)

    def observers(self, hook: str) -> Callable[..., None] | None:
        """A function that tells every observer, or None when nobody listens."""
        implementations = [
            (implementation.plugin_name, implementation.function)
            for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls())
        ]
        if not implementations:
            return None
        return _Observers(hook, implementations, self.seconds)

    def provided_by(self, plugin: str) -> dict[str, list[str]]:
        """Hook to the names that one plugin provides through it; for people."""
        provided: dict[str, list[str]] = {}
        for hook in self._hook_names():
            for name, result in self._call(hook, only=plugin) if _is_provider(hook) else ():
                if name == plugin:
                    provided[hook] = [_label(item) for item in result]
        return provided

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

    def _check_hooks(self) -> None:
        known = self._hook_names()
        for record in self.manifest:
            module = self._manager.get_plugin(record.name)
            unknown = [
                name
                for name in vars(module)
                if name.startswith(f"{PROJECT}_")
                and self._manager.parse_hookimpl_opts(module, name) is not None
                and name not in known
            ]
            if unknown:
                raise self._broken(
                    record.name, f"implements unknown hooks {', '.join(unknown)}; known: {', '.join(sorted(known))}"
                )
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(str(error)) from error

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

    def _call(self, hook: str, only: str | None = None) -> list[tuple[str, Any]]:
        """``(plugin name, result)`` in the order of selection."""
        results = []
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            if only is not None and implementation.plugin_name != only:
                continue
            started = time.perf_counter()
            try:
                result = implementation.function()
            except Exception as error:
                raise self._broken(
                    implementation.plugin_name, f"failed in {hook}: {type(error).__name__}: {error}"
                ) from error
            self.seconds[implementation.plugin_name, hook] = time.perf_counter() - started
            results.append((implementation.plugin_name, result))
        order = {record.name: position for position, record in enumerate(self.manifest)}
        return sorted(results, key=lambda pair: order[pair[0]])

    def _providers(self, hook: str, key: Callable[[Any], str] = lambda provider: provider.name) -> dict[str, Provider]:
        if hook in self._cache:
            return self._cache[hook]
        found: dict[str, Provider] = {}
        owners: dict[str, str] = {}
        for plugin, result in self._call(hook):
            for provider in result:
                if not isinstance(provider, Provider):
                    raise self._broken(plugin, f"{hook} must return Provider records, not {type(provider).__name__}")
                name = key(provider)
                if found.get(name) == provider:
                    continue  # plugins that share an implementation all name it
                if name in owners:
                    preferred = self._prefer.get(name)
                    here, there = self._distribution[plugin], self._distribution[owners[name]]
                    if preferred not in (here, there):
                        raise self._claimed_twice(hook, name, owners[name], plugin)
                    if preferred == there:
                        continue
                owners[name] = plugin
                found[name] = provider
        self._cache[hook] = found
        return found

    def _claimed_twice(self, hook: str, name: str, first: str, second: str) -> PluginError:
        one, two = self._distribution[first], self._distribution[second]
        return PluginError(
            f"'{name}' ({hook}) is provided by plugin '{first}' of {one} and by plugin '{second}' of {two}; "
            f"choose with --prefer {name}={one}"
        )

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


def _is_provider(hook: str) -> bool:
    return hook not in ("octavo_check_config", "octavo_request_finished", "octavo_step_finished", "octavo_commands")


def _label(item: Any) -> str:
    if isinstance(item, KernelProvider):
        return f"{item.operation}/{item.name}"
    return str(getattr(item, "name", None) or getattr(item, "title", None) or type(item).__name__)
