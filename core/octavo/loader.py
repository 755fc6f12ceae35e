"""Checkpoints: finding a model's files, reading safetensors, and handing each layer what it asks for."""

from __future__ import annotations

import difflib
import json
import logging
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError
from octavo.interfaces import Checkpoint, Placement, TensorInfo, WeightSource
from octavo.operations import Operations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from octavo.interfaces import WeightFormat

logger = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")


class SafetensorsWeights:
    """The tensors of one or more safetensors files, mapped into memory; nothing is read before it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads the headers only.

        Raises:
            CheckpointError: a file is broken, or two files hold the same tensor.
        """
        self._files: dict[str, Any] = {}
        self._owner: dict[str, Path] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is not a complete safetensors file: {error}; fetch it again") from error
            self._files[str(file)] = opened
            names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
            for name in names:
                if name in self._owner:
                    raise CheckpointError(f"tensor '{name}' is in both {self._owner[name]} and {file}; remove one file")
                self._owner[name] = file

    def names(self) -> Collection[str]:
        return self._owner.keys()

    def info(self, name: str) -> TensorInfo:
        part = self._slice(name)
        kind = part.get_dtype()
        if kind not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"tensor '{name}' in {self._owner[name]} has the unknown dtype {kind}")
        return TensorInfo(tuple(part.get_shape()), SAFETENSORS_DTYPES[kind], str(self._owner[name]))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        part = self._slice(name)
        tensor: Tensor = part[index] if index else part[...]
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._owner:
            raise missing_tensor(name, self._owner, "the checkpoint")
        return self._files[str(self._owner[name])].get_slice(name)


def missing_tensor(name: str, names: Collection[str], where: str) -> CheckpointError:
    """The error for a tensor that is not there, with the names that come nearest."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return CheckpointError(
        f"tensor '{name}' is missing from {where} ({len(names)} tensors){hint}. "
        f"The files may be incomplete or belong to another architecture"
    )


class HuggingFaceFolder:
    """A folder with ``config.json``, tokenizer files and safetensors: the format that the core reads itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        file = self.path / "generation_config.json"
        return _read_json(file) if file.exists() else {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"no usable tokenizer in {self.path}: {error}; name one with --tokenizer") from error
        return tokenizer

    def weights(self) -> WeightSource:
        return SafetensorsWeights(self._weight_files())

    def _weight_files(self) -> list[Path]:
        indexes = sorted(self.path.glob("*.safetensors.index.json"))
        if indexes:
            weight_map = _read_json(indexes[0]).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{indexes[0]} has no weight_map from tensors to files; fetch it again")
            shards = sorted({self.path / name for name in weight_map.values()})
            absent = [shard.name for shard in shards if not shard.exists()]
            if absent:
                raise CheckpointError(f"{indexes[0]} names {', '.join(absent)}, which is not there; fetch it again")
            return shards
        single = self.path / "model.safetensors"
        files = [single] if single.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
            hint = f" ({', '.join(pickles)} may run code when opened and is not read; convert it)" if pickles else ""
            raise CheckpointError(f"no *.safetensors file in {self.path}{hint}")
        return files


class HuggingFaceFormat:
    """See :class:`octavo.interfaces.WeightFormat`."""

    name: ClassVar[str] = "huggingface"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_dir() and (path / "config.json").is_file()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        return HuggingFaceFolder(path)


def open_checkpoint(path: Path, formats: Iterable[type[WeightFormat]]) -> Checkpoint:
    """The first format that accepts ``path``.

    Raises:
        CheckpointError: none does; says what was looked for.
    """
    tried: list[type[WeightFormat]] = [HuggingFaceFormat, *formats]
    for kind in tried:
        if kind.accepts(path):
            return kind.open(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    what = "has no config.json" if path.is_dir() else "is not a model file"
    names = ", ".join(kind.name for kind in tried)
    raise CheckpointError(f"{path} {what}; formats that were tried: {names}")


def resolve_model_path(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local file or folder as it is, else a name on the Hugging Face hub, fetched into its cache.

    With ``weights=False`` only the small files are fetched. Honours ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``.

    Raises:
        CheckpointError: neither here nor on the hub; says both.
    """
    local = Path(model).expanduser()
    if local.exists():
        return local
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"model '{model}' is neither a file or folder here nor a name on the hub (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [pattern for pattern in HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model '{model}' is not a folder here and could not be fetched from the hub: {error}"
        ) from error


class NoWeights:
    """The weights of a checkpoint of which only the configuration is used."""

    def names(self) -> Collection[str]:
        return ()

    def info(self, name: str) -> TensorInfo:
        raise missing_tensor(name, (), "a dummy checkpoint")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        raise missing_tensor(name, (), "a dummy checkpoint")


class CheckpointLoader:
    """Hands layers the tensors they ask for, on the device; see :class:`octavo.interfaces.LayerLoader`."""

    def __init__(self, weights: WeightSource, placement: Placement, operations: Operations) -> None:
        self.placement = placement
        self._weights = weights
        self._names = frozenset(weights.names())
        self._operations = operations
        self._read: set[str] = set()
        self.num_bytes_read = 0

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self._weights.info(name)
        if info.shape != shape and not (shape == () and info.shape == (1,)):
            raise CheckpointError(
                f"tensor '{name}' in {info.file} has the shape {list(info.shape)}, but the configuration needs "
                f"{list(shape)}; config.json and the weights do not belong together"
            )
        tensor = self._weights.read(name, index).reshape(_indexed(shape, index))
        self._read.add(name)
        self.num_bytes_read += tensor.nbytes
        # .clone() on a CPU: what is kept must not hang on to the mapped file
        moved = tensor.to(self.placement.device, dtype or tensor.dtype)
        return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved

    def kernel(self, operation: str, need: Any) -> Any:
        return self._operations.choose(operation, need)

    def unread(self) -> list[str]:
        """Names in the checkpoint that no layer asked for."""
        return sorted(self._names - self._read)


class DummyLoader:
    """Random weights of the right shapes, for benchmarks: ``--load-format dummy`` needs a configuration only.

    The same name always gives the same values, whatever order layers are made in.
    """

    def __init__(self, placement: Placement, operations: Operations, *, scale: float = 0.02) -> None:
        self.placement = placement
        self._operations = operations
        self._scale = scale

    def has(self, name: str) -> bool:
        return False

    def tensor(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or self.placement.dtype
        device = self.placement.device
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        shape = _indexed(shape, index)
        if not dtype.is_floating_point:
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            return torch.randint(low, high, shape, dtype=dtype, device=device, generator=generator)
        if len(shape) <= 1:  # norms and scales near one keep activations in range
            return torch.ones(shape, dtype=dtype, device=device)
        values = torch.empty(shape, dtype=torch.float32 if dtype.itemsize == 1 else dtype, device=device)
        return values.normal_(0.0, self._scale, generator=generator).to(dtype)

    def kernel(self, operation: str, need: Any) -> Any:
        return self._operations.choose(operation, need)


def _indexed(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape that ``tensor[index]`` has."""
    cut = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=False)]
    return (*cut, *shape[len(index) :])


def choose_dtype(config: Mapping[str, Any], wanted: str, device: torch.device) -> torch.dtype:
    """The activations' dtype: what was asked for, else the checkpoint's own where the device computes in it well."""
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if wanted != "auto":
        if wanted not in named:
            raise ConfigError(f"dtype '{wanted}' is not supported; known: auto, {', '.join(named)}")
        return named[wanted]
    stored = named.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    if device.type == "cpu":
        # half precision without the instructions for it is slower than float32, and float16 has none at all
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.bfloat16 if stored is torch.float32 else stored


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; fetch it again")
    return content
