"""Which attention backend serves a model: asked in order of priority, each answering with what it is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from octavo.attention.torch_backend import TorchAttention
from octavo.hooks import Provider
from octavo.interfaces import AttentionBackend, AttentionNeed
from octavo.operations import choose

logger = logging.getLogger(__name__)

REFERENCE = Provider("torch", TorchAttention, priority=-100)


def choose_backend(providers: Iterable[Provider], need: AttentionNeed, name: str | None = None) -> AttentionBackend:
    """A backend that lacks nothing; ``name`` insists on one.

    Raises:
        ConfigError: none can serve; every candidate's reasons.
    """
    chosen, backend = choose("attention backend", [REFERENCE, *providers], need, name)
    logger.info("attention backend: %s", chosen)
    made: AttentionBackend = backend(need)
    return made
