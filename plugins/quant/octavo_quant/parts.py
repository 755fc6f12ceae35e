"""Loading a fused layer part by part: what can be joined becomes one product, the rest lies side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import LayerLoader, LinearMethod, LinearPart, LinearSpec, WeightSource
from octavo.layers.linear import JoinedLinear, load_plain


class QuantizedWeight(Protocol):
    """A quantized matrix on the device that may be joined with others of its kind."""

    def joins(self, other: Self) -> bool: ...

    @staticmethod
    def join(weights: Sequence[Any]) -> Any: ...

    def method(self, bias: Tensor | None, load: LayerLoader) -> LinearMethod: ...


def load_parts(
    spec: LinearSpec,
    load: LayerLoader,
    is_quantized: Callable[[LinearPart], bool],
    read: Callable[[LinearPart], QuantizedWeight],
) -> LinearMethod | None:
    """The layer ``spec``; None when no part of it is quantized.

    Neighbouring parts are joined into one product where their formats allow it.
    """
    if not any(is_quantized(part) for part in spec.parts):
        return None
    methods: list[LinearMethod] = []
    run: list[QuantizedWeight] = []
    biases: list[Tensor] = []
    plain: list[LinearPart] = []

    def flush() -> None:
        if run:
            joined = run[0] if len(run) == 1 else run[0].join(run)
            methods.append(joined.method(torch.cat(biases) if biases else None, load))
        if plain:
            methods.append(load_plain(replace(spec, parts=tuple(plain)), load))
        run.clear()
        biases.clear()
        plain.clear()

    for part in spec.parts:
        if not is_quantized(part):
            if run:
                flush()
            plain.append(part)
            continue
        weight = read(part)
        if plain or (run and not (type(weight) is type(run[0]) and weight.joins(run[0]))):
            flush()
        run.append(weight)
        bias = read_bias(part, spec, load)
        if bias is not None:
            biases.append(bias)
    flush()
    return methods[0] if len(methods) == 1 else JoinedLinear(methods)


def read_bias(part: LinearPart, spec: LinearSpec, load: LayerLoader) -> Tensor | None:
    """The part's bias [rows] of this rank, in the activations' dtype.

    auto-gptq writes a bias of zeros for layers that have none: it is left out.

    Raises:
        CheckpointError: a layer without a bias has one that is not zero.
    """
    name, shape = f"{part.name}.bias", (part.out_features,)
    if spec.bias:
        return load.tensor(name, shape, (part.rows,), load.placement.dtype)
    if load.has(name) and bool(load.tensor(name, shape).any()) and spec.num_columns == spec.in_features:
        raise CheckpointError(
            f"tensor '{name}' is not zero, but this architecture has no bias there; config.json and the weights do "
            f"not belong together"
        )
    return None


class PartTensors:
    """The tensors of one quantized projection, with errors that say which file is incomplete."""

    def __init__(self, weights: WeightSource, load: LayerLoader, part: LinearPart) -> None:
        self.name = part.name
        self._weights = weights
        self._load = load
        self._invented = not weights.names()

    def has(self, suffix: str) -> bool:
        return self._load.has(f"{self.name}.{suffix}")

    def shape(self, suffix: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape; ``default`` for invented weights."""
        return default if self._invented else self._weights.info(f"{self.name}.{suffix}").shape

    def dtype(self, suffix: str, default: torch.dtype) -> torch.dtype:
        """The stored dtype; ``default`` for invented weights."""
        return default if self._invented else self._weights.info(f"{self.name}.{suffix}").dtype

    def file(self, suffix: str) -> str:
        return self._weights.info(f"{self.name}.{suffix}").file

    def read(
        self,
        suffix: str,
        shape: tuple[int, ...],
        index: tuple[slice, ...] = (),
        *,
        beside: str,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The tensor ``suffix``; ``beside`` is the one whose presence says that this must be there, too.

        Raises:
            CheckpointError: it is missing, or its shape or dtype is wrong.
        """
        if not self._invented and not self.has(suffix) and self.has(beside):
            raise CheckpointError(
                f"tensor '{self.name}.{suffix}' is missing, although {self.file(beside)} holds '{self.name}.{beside}'; "
                f"the file is incomplete: fetch it again or quantize the model again"
            )
        stored = self.dtype(suffix, dtype or torch.float16)
        if dtype is not None and stored != dtype:
            raise CheckpointError(
                f"tensor '{self.name}.{suffix}' in {self.file(suffix)} has the dtype {stored}, but the format needs "
                f"{dtype}; quantize the model again"
            )
        return self._load.tensor(f"{self.name}.{suffix}", shape, index, stored if self._invented else dtype)


def one_of(settings_name: str, value: Any, supported: Sequence[Any], method: str) -> Any:
    """``value`` if it is supported.

    Raises:
        CheckpointError: names the setting, its value, what is supported and the remedy.
    """
    if value not in supported:
        raise CheckpointError(
            f"{settings_name} {value!r} of the {method} checkpoint's settings is not supported; supported: "
            f"{', '.join(str(known) for known in supported)}. Choose a checkpoint in one of these, or quantize again"
        )
    return value


def multiple(size: int, factor: int, what: str, part: LinearPart, method: str) -> None:
    """Refuse sizes that the format cannot hold."""
    if size % factor:
        raise CheckpointError(
            f"{part.name}: {what} ({size}) is not a multiple of {factor}, which {method} needs to pack it; "
            f"config.json and the weights do not belong together"
        )


def require_settings(settings: Any, method: str) -> None:
    """Refuse to make a format out of an unquantized checkpoint."""
    if not settings:
        raise CheckpointError(
            f"the checkpoint is not quantized, and {method} needs calibration before it can be served: make one with "
            f"'octavo quantize MODEL OUT --method {method}', or use --quantization fp8, which works while loading"
        )


def checked_groups(groups: Tensor, num_groups: int, name: str, file: str, spec: LinearSpec) -> Tensor:
    """``groups`` [in_features] of a file as int64, once it is known that they can be served.

    Raises:
        CheckpointError: a group does not exist, or inputs of all groups are spread over ranks.
    """
    groups = groups.long()
    if bool(((groups < 0) | (groups >= num_groups)).any()):
        raise CheckpointError(
            f"tensor '{name}' in {file} names groups outside 0 to {num_groups - 1}; the file is damaged or its "
            f"group_size is another than the settings say"
        )
    if spec.num_columns != spec.in_features and bool((groups[1:] < groups[:-1]).any()):
        raise CheckpointError(
            f"tensor '{name}' in {file} orders inputs by activation, and {spec.name} splits them over ranks: a rank's "
            f"{spec.num_columns} inputs would need every group. Use --tensor-parallel-size 1 or a checkpoint made "
            f"with desc_act=false or static groups"
        )
    return groups


def checked_group_size(size: Any, method: str) -> int:
    """A group's number of inputs, or -1: all of them.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
        raise CheckpointError(
            f"group_size {size!r} of the {method} checkpoint's settings is neither -1 nor a size; correct it"
        )
    return size
