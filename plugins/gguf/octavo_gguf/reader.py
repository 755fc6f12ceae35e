"""Reads the layout of a GGUF file: metadata and where each tensor lies. Format: ggml's docs/gguf.md, versions 2 and 3.

The file is mapped into memory; tensors are not touched. Parsing 98 000 strings takes some hundredths of a second.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class BlockType:
    """A ggml tensor type: ``block_size`` elements in ``block_bytes`` bytes."""

    name: str
    block_size: int
    block_bytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_LENGTH = _SCALARS[10]


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: ``shape`` in the order of torch (rows first), ``offset`` from the start of the file in bytes."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def num_rows(self) -> int:
        """Rows of blocks: a vector is one row."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block_size * self.type.block_bytes


class GGUFFile:
    """A mapped GGUF file.

    ``metadata`` maps keys to numbers, strings, lists of strings or numpy arrays; ``tensors`` maps names to places.

    Raises:
        CheckpointError: the file is no GGUF file, of another version, cut short, or holds a tensor of a type that is
            not read here; names the file and the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._at = 0
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        version = self._number(4)
        if version not in VERSIONS:
            raise CheckpointError(
                f"{path} has GGUF version {version} (big-endian files show a huge one); known: "
                f"{', '.join(map(str, VERSIONS))}"
            )
        num_tensors, num_keys = self._number(10), self._number(10)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._number(4))
        places = [self._tensor_place() for _ in range(num_tensors)]
        self.tensors = self._locate(places)

    def rows(self, tensor: GGUFTensor) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the file, [num_rows, row_bytes]; read only."""
        count = tensor.num_rows * tensor.row_bytes
        flat = np.frombuffer(self._data, np.uint8, count, tensor.offset)
        return flat.reshape(tensor.num_rows, tensor.row_bytes)

    def _tensor_place(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number(4)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"tensor '{name}' in {self.path} has {num_dimensions} dimensions; the file is broken")
        shape = tuple(self._number(10) for _ in range(num_dimensions))[::-1]
        return name, shape, self._number(4), self._number(10)

    def _locate(self, places: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path} has general.alignment {alignment}; the file is broken")
        start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in places:
            block = BLOCK_TYPES.get(kind)
            if block is None:
                known = ", ".join(block.name for block in BLOCK_TYPES.values())
                raise CheckpointError(
                    f"tensor '{name}' in {self.path} has the ggml type {kind}, which is not read here; known: {known}. "
                    f"Take a file that is quantized to one of these"
                )
            if shape[-1] % block.block_size:
                raise CheckpointError(
                    f"tensor '{name}' in {self.path} has rows of {shape[-1]} elements, which do not fill blocks of "
                    f"{block.block_size} ({block.name}); the file is broken"
                )
            tensor = GGUFTensor(name, shape, block, start + offset)
            end = tensor.offset + tensor.num_rows * tensor.row_bytes
            if end > len(self._data):
                raise CheckpointError(
                    f"{self.path} is cut short: tensor '{name}' ends at byte {end}, the file at {len(self._data)}; "
                    f"fetch it again"
                )
            tensors[name] = tensor
        return tensors

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise self._cut_short()
        data = self._data[self._at : end]
        self._at = end
        return data

    def _cut_short(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is cut short or broken at byte {self._at}; fetch it again")

    def _number(self, kind: int) -> Any:
        scalar = _SCALARS[kind]
        return scalar.unpack(self._take(scalar.size))[0]

    def _string(self) -> str:
        return self._take(self._number(10)).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number(4), self._number(10))
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} holds a metadata value of the unknown type {kind}; the file is broken")
        return self._number(kind)

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} holds an array of the unknown type {kind}; the file is broken")
        scalar = _SCALARS[kind]
        return np.frombuffer(self._take(count * scalar.size), np.dtype(scalar.format))

    def _strings(self, count: int) -> list[str]:
        data, at, unpack = self._data, self._at, _LENGTH.unpack_from
        found = []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                found.append(data[at : at + length].decode("utf-8", errors="replace"))
                at += length
        except (struct.error, OverflowError) as error:
            raise self._cut_short() from error
        self._at = at
        self._take(0)  # a last string that is cut short leaves the place beyond the end
        return found
