"""The plugin ``prefix-cache``: finished blocks are found again by their content."""

from __future__ import annotations

from octavo import PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=(1, 1), summary="Prefix caching by a chain of hashes")


@hookimpl
def octavo_prefix_caches() -> list[Provider]:
    return [Provider("hash-chain", "octavo_cache.hash_chain:HashChain")]
