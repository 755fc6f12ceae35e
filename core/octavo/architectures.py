"""From the name in ``config.json`` to the class that builds the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from octavo.errors import CheckpointError, ConfigError
from octavo.hooks import ENTRY_POINT_GROUP, Provider
from octavo.interfaces import Model


def choose_model(config: Mapping[str, Any], providers: Mapping[str, Provider]) -> type[Model]:
    """The first of the config's ``architectures`` that a plugin provides.

    ``providers`` maps architecture names to the records that the hook ``octavo_models`` returned.

    Raises:
        CheckpointError: the config names no architecture.
        ConfigError: none is provided, or what provides it cannot be imported here; lists the known ones and says how a
            plugin adds one.
    """
    architectures = config.get("architectures")
    if not architectures or not isinstance(architectures, list):
        raise CheckpointError(
            "config.json has no list 'architectures', so nothing says what to build; name one of the known "
            f'architectures with --hf-overrides \'{{"architectures": ["…"]}}\': {_known(providers)}'
        )
    for name in architectures:
        if name in providers:
            return _resolve(providers[name])
    wanted = ", ".join(f"'{name}'" for name in architectures)
    near = difflib.get_close_matches(str(architectures[0]), providers, n=1, cutoff=0.8)
    hint = f" (the nearest is {near[0]})" if near else ""
    raise ConfigError(
        f"no selected plugin provides the architecture {wanted}{hint}; known: {_known(providers)}. "
        f"A plugin adds one: a module under an entry point in the group '{ENTRY_POINT_GROUP}' that implements the hook "
        f"octavo_models; see docs/plugins/models.md"
    )


def _resolve(provider: Provider) -> type[Model]:
    lacking = provider.lacking()
    if lacking:
        raise ConfigError(f"the architecture '{provider.name}' cannot be used here: {'; '.join(lacking)}")
    model: type[Model] = provider.resolve()
    return model


def _known(providers: Mapping[str, Provider]) -> str:
    return ", ".join(sorted(providers)) or "none (is the plugin 'models' left out?)"
