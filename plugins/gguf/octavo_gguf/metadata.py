"""A GGUF file's keys and values, read as what they must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import CheckpointError


class Metadata:
    """Typed access to what a file says of itself. Every getter returns None for a key that the file does not have.

    Raises:
        CheckpointError: from every getter, when the value is of another type or size; names file, key and value.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values

    def text(self, key: str) -> str | None:
        """A string."""
        value: str | None = self._get(key, str, "a text")
        return value

    def flag(self, key: str) -> bool | None:
        """A truth value."""
        value: bool | None = self._get(key, bool, "true or false")
        return value

    def integer(self, key: str, at_least: int = 0) -> int | None:
        """A whole number."""
        what = f"a whole number of at least {at_least}"
        value: int | None = self._get(key, int, what)
        if value is not None and value < at_least:
            raise self._wrong(key, what)
        return value

    def number(self, key: str) -> float | None:
        """A finite number above 0."""
        what = "a number above 0"
        value: float | None = self._get(key, (int, float), what)
        if value is not None and not 0.0 < value < float("inf"):
            raise self._wrong(key, what)
        return value

    def texts(self, key: str) -> list[str] | None:
        """An array of strings."""
        value: list[str] | None = self._get(key, list, "an array of texts")
        return value

    def numbers(self, key: str) -> NDArray[Any] | None:
        """An array of numbers."""
        value: NDArray[Any] | None = self._get(key, np.ndarray, "an array of numbers")
        return value

    def size(self, key: str) -> int:
        """A whole number above 0 that must be there."""
        value = self.integer(key, at_least=1)
        if value is None:
            raise self._missing(key)
        return value

    def require_number(self, key: str) -> float:
        """A number above 0 that must be there."""
        value = self.number(key)
        if value is None:
            raise self._missing(key)
        return value

    def _get(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, np.ndarray) and kind is not np.ndarray:
            raise CheckpointError(f"{self.path} has an array under '{key}'; only {what}, one for all, is supported")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(key, what)
        return value

    def _wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} has {repr(self._values[key])[:60]} under '{key}', which must be {what}; the file is broken: "
            f"fetch it or convert the model again"
        )

    def _missing(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.path} lacks the metadata '{key}'; fetch it or convert the model again")
