"""The hook specifications: what a plugin can provide, and the manual for its author.

A plugin is a Python module that an entry point in the group ``octavo.plugins`` names. It declares itself with a
:class:`PluginInfo` called ``plugin`` and implements any of the hooks below with :data:`hookimpl`::

    from octavo import PluginInfo, Provider, hookimpl

    plugin = PluginInfo(api=(1, 1), summary="The Acme architecture")

    @hookimpl
    def octavo_models():
        return [Provider("AcmeForCausalLM", "acme_octavo.model:AcmeForCausalLM")]

Hooks supply classes at start-up; plain objects do the work. A provider hook returns records that *name* classes, as
``"module:Class"`` strings wherever importing costs anything: only what is chosen is imported. Provider hooks have no
side effects and may run in every process. An implementation may take fewer arguments than its hook offers. An
exception in a provider hook stops the program, naming the plugin and the option that leaves it out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from octavo.errors import PluginError

if TYPE_CHECKING:
    from fastapi import APIRouter
    from prometheus_client.registry import Collector

    from octavo.config import EngineConfig
    from octavo.messages import StepStats
    from octavo.outputs import RequestSummary

API_VERSION = 1
"""The version of everything in this module and in :mod:`octavo.interfaces`. Raised when a plugin could notice."""

PROJECT = "octavo"
ENTRY_POINT_GROUP = "octavo.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

CAPABILITIES = (
    "chunked-prefill",
    "prefix-caching",
    "speculation",
    "cuda-graphs",
    "overlap",
    "tensor-parallel",
    "batch-invariant",
    "fp8-kv-cache",
)
"""What a plugin may declare that it does not work with."""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin's declaration about itself: the module attribute ``plugin``.

    ``api`` is the inclusive range of API versions that it was written for. ``incompatible`` lists capabilities
    (:data:`CAPABILITIES`) or other plugins' names that it cannot be combined with; asking for both is refused at start.
    """

    api: tuple[int, int]
    summary: str
    incompatible: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Provider:
    """A named class that a plugin provides.

    ``target`` is the class or ``"module:Class"``. Of several that can serve, the highest ``priority`` wins.
    ``requires`` names modules that must be importable; when one is not, this provider is passed over with that reason.
    """

    name: str
    target: type | str
    priority: int = 0
    requires: tuple[str, ...] = ()

    def lacking(self) -> list[str]:
        """Reasons why the target cannot even be imported here; empty: it can."""
        return [f"the module '{name}' is not installed" for name in self.requires if not _importable(name)]

    def resolve(self) -> Any:
        """The class. Raises PluginError when the string names none."""
        if not isinstance(self.target, str):
            return self.target
        module_name, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"provider '{self.name}' names '{self.target}', which cannot be imported: {error}"
            ) from error


@dataclass(frozen=True, slots=True)
class KernelProvider(Provider):
    """An implementation of an operation; see :mod:`octavo.operations` for the operations and how each is called."""

    operation: str = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Command-line options of one plugin. ``add(parser_group)`` adds arguments whose destinations must start with the
    plugin's name and an underscore; their values reach ``EngineConfig.plugin_options`` under that destination."""

    title: str
    add: Any  # Callable[[argparse._ArgumentGroup], None]


@dataclass(frozen=True, slots=True)
class RouteProvider:
    """Routes for the server. They inherit its authentication unless ``open`` declares that anyone may call them."""

    router: APIRouter
    open: bool = False


class Hooks:
    """Every hook, grouped by subject. "Process" says where it is called."""

    # --- start-up -----------------------------------------------------------------------------------------------------

    @hookspec
    def octavo_options(self) -> Sequence[OptionGroup]:
        """Command-line options. Called before the command line is parsed, once, in the process that parses it."""
        raise NotImplementedError

    @hookspec
    def octavo_check_config(self, config: EngineConfig) -> None:
        """Called once when the configuration is resolved and frozen, in the API process.

        Raise :class:`octavo.errors.ConfigError` to refuse it; say what to change.
        """

    # --- models and weights ------------------------------------------------------------------------------------------

    @hookspec
    def octavo_models(self) -> Sequence[Provider]:
        """Model architectures: the name is the entry of ``architectures`` in ``config.json``, the class an
        :class:`octavo.interfaces.Model`. Engine start, in the engine's process."""
        raise NotImplementedError

    @hookspec
    def octavo_weight_formats(self) -> Sequence[Provider]:
        """File formats: classes of :class:`octavo.interfaces.WeightFormat`. Start-up, in both processes."""
        raise NotImplementedError

    @hookspec
    def octavo_quantizations(self) -> Sequence[Provider]:
        """Quantized weights: the name is the checkpoint's ``quant_method``, the class an
        :class:`octavo.interfaces.Quantization`. Engine start, in the engine's process."""
        raise NotImplementedError

    # --- computation -------------------------------------------------------------------------------------------------

    @hookspec
    def octavo_attention_backends(self) -> Sequence[Provider]:
        """Classes of :class:`octavo.interfaces.AttentionBackend`. Engine start, in the engine's process; asked for
        what is ``missing`` in order of priority until one lacks nothing."""
        raise NotImplementedError

    @hookspec
    def octavo_kernels(self) -> Sequence[KernelProvider]:
        """Implementations of the operations in :mod:`octavo.operations`. Engine start, in the engine's process."""
        raise NotImplementedError

    @hookspec
    def octavo_kernel_compilers(self) -> Sequence[Provider]:
        """Classes of :class:`octavo.interfaces.KernelCompiler`, made with ``(device, num_workers)``: all
        that lack nothing for the device watch a trial run of the model, unless ``--compile-workers`` is 0. Engine
        start, in the engine's process."""
        raise NotImplementedError

    @hookspec
    def octavo_kernel_benchmarks(self) -> Sequence[Provider]:
        """What ``octavo bench kernels`` runs of operations that the plugin itself has named: the name is the
        operation's, the target a function that takes an :class:`octavo.bench.kernel_cases.Setting` and yields
        :class:`octavo.bench.kernel_cases.Case`. Called when that command starts, in its process."""
        raise NotImplementedError

    # --- scheduling and sampling -------------------------------------------------------------------------------------

    @hookspec
    def octavo_prefix_caches(self) -> Sequence[Provider]:
        """Classes of :class:`octavo.prefix.PrefixCache`, made with ``(block_size)``. Engine start, in the
        engine's process."""
        raise NotImplementedError

    @hookspec
    def octavo_scheduling_policies(self) -> Sequence[Provider]:
        """Classes of :class:`octavo.policies.SchedulingPolicy`, made without arguments. Engine start,
        in the engine's process."""
        raise NotImplementedError

    @hookspec
    def octavo_drafters(self) -> Sequence[Provider]:
        """Speculation: classes of :class:`octavo.interfaces.Drafter`, made with ``(config, context)``; the name is
        what ``--speculative-method`` chooses. Engine start, in the engine's process."""
        raise NotImplementedError

    @hookspec
    def octavo_logits_processors(self) -> Sequence[Provider]:
        """Classes of :class:`octavo.interfaces.LogitsProcessor`, made with ``(vocab_size, device)``; all that are
        provided run, in order of priority, on the rows that want them. Engine start, in the engine's
        process."""
        raise NotImplementedError

    # --- server and command line -------------------------------------------------------------------------------------

    @hookspec
    def octavo_routes(self) -> Sequence[RouteProvider]:
        """HTTP routes. Server start, in the API process. A path that is taken already is an error."""
        raise NotImplementedError

    @hookspec
    def octavo_commands(self) -> Mapping[str, Any]:
        """Sub-commands of ``octavo``: name to a function that takes the sub-parser, adds its arguments and sets
        ``run`` as its default. Called before the command line is parsed, once, in the process that parses it."""
        raise NotImplementedError

    @hookspec
    def octavo_metrics(self) -> Sequence[Collector]:
        """Prometheus collectors that ``/metrics`` shows beside ours. Server start, in the API process."""
        raise NotImplementedError

    # --- observers ---------------------------------------------------------------------------------------------------

    @hookspec
    def octavo_request_finished(self, summary: RequestSummary) -> None:
        """Once per finished request, in the API process. An exception is reported and switches this observer off;
        it never reaches the engine or a client."""

    @hookspec
    def octavo_step_finished(self, stats: StepStats) -> None:
        """Once per step, in the API process, and only if somebody implements it. An exception is reported and
        switches this observer off."""


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


__all__ = [
    "API_VERSION",
    "CAPABILITIES",
    "Hooks",
    "KernelProvider",
    "OptionGroup",
    "PluginInfo",
    "Provider",
    "RouteProvider",
    "hookimpl",
]
