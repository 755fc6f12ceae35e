"""The protocols that plugins implement, and the values that pass through them.

Everything a third party needs to write a model, a weight format, a quantization, an attention backend, a kernel, a
prefix cache, a scheduling policy, a drafter or a logits processor is here or in :mod:`octavo.hooks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from octavo.batch import ForwardBatch
    from octavo.config import DType, EngineConfig
    from octavo.layers.attention import Attention, ForwardContext
    from octavo.layers.builder import Builder
    from octavo.request import Request, SamplingParams
    from octavo.runner import Runner

# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor of a checkpoint lies and what it is before anything is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


class WeightSource(Protocol):
    """The tensors of a checkpoint under the names that Hugging Face gives them. Nothing is read before ``read``."""

    def names(self) -> Collection[str]:
        """Every tensor's name."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor. Raises CheckpointError, naming near matches, when there is none."""
        ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or the part of it that ``index`` names, on the host; may share memory with the file."""
        ...


class Checkpoint(Protocol):
    """A model's files, whatever their format."""

    path: Path

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds, in Hugging Face's terms."""
        ...

    def generation_config(self) -> dict[str, Any]:
        """What ``generation_config.json`` holds; empty when there is none."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template when there is one."""
        ...

    def weights(self) -> WeightSource:
        """The tensors."""
        ...


class WeightFormat(Protocol):
    """A way to keep a model in files. The core reads Hugging Face folders with safetensors; plugins add others."""

    name: ClassVar[str]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether the file or folder is of this format; cheap, and never raises for a path of another kind."""
        ...

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises CheckpointError, naming the file, when it is broken."""
        ...


# --- models ----------------------------------------------------------------------------------------------------------


class Model(Protocol):
    """A decoder. Built from a config and a :class:`~octavo.layers.builder.Builder`, which loads as it builds.

    A class that implements this takes ``(config: Mapping[str, Any], build: Builder)``: ``config`` is the content of
    ``config.json``. It must not read files, know quantization formats, devices or ranks: the builder does.
    """

    def __init__(self, config: Mapping[str, Any], build: Builder) -> None: ...

    def forward(self, tokens: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """``tokens`` and ``positions`` [num_tokens] int -> hidden states [num_tokens, hidden_size], or [num_kept,
        hidden_size] of those that :meth:`octavo.layers.attention.ForwardContext.keep` leaves."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] -> logits [num_rows, vocab_size] in any floating dtype."""
        ...


@runtime_checkable
class ObservedModel(Model, Protocol):
    """A model that shows its hidden states (:meth:`octavo.layers.attention.ForwardContext.record`), so that a drafter
    can build on them."""

    num_layers: int
    hidden_size: int

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [num_tokens] int -> [num_tokens, hidden_size], what goes into the first layer."""
        ...


class HiddenStateRecorder(Protocol):
    """Keeps hidden states of the target for each token, in blocks as keys and values are kept: so they are there for
    whatever the prefix cache finds or a fork shares."""

    layers: Collection[int]  # whose inputs; the number of layers stands for what the model returns

    def start(self, num_blocks: int) -> Tensor:
        """Take the memory. Returns it as [num_blocks, …]: a block that is copied is copied there, too."""
        ...

    def record(self, layer: int, hidden: Tensor, batch: ForwardBatch) -> None:
        """hidden [num_tokens, hidden_size], valid during the call only, of the batch's tokens, which have their place
        at ``batch.slots``. Called for the layers in ascending order; may be captured in a CUDA graph."""
        ...


# --- linear layers and quantization ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One projection of the checkpoint inside a (possibly fused) linear layer.

    ``rows`` are the output features of the checkpoint's matrix that this rank holds, of ``out_features`` in all.
    """

    name: str  # the module's full name in the checkpoint, e.g. "model.layers.0.self_attn.q_proj"
    out_features: int
    rows: slice

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A linear layer as a model asks for it: ``y = x Wᵀ + b``, the parts' outputs side by side.

    ``columns`` are the input features that this rank holds, of ``in_features`` in all. ``bias`` says that the parts
    have biases in the checkpoint; a row-parallel layer adds its bias on rank 0 only.
    """

    name: str
    parts: tuple[LinearPart, ...]
    in_features: int
    columns: slice
    bias: bool

    @property
    def num_columns(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where computation happens, in which dtype activations are, and whether a row may depend on its batch."""

    device: torch.device
    dtype: torch.dtype
    batch_invariant: bool = False  # every row's result is the same to the last bit whatever rows are beside it


@runtime_checkable
class LinearMethod(Protocol):
    """A loaded linear layer: holds its weights in whatever form its kernel wants."""

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features of this rank] -> [num_tokens, out_features of this rank], same dtype."""
        ...

    def num_bytes(self) -> int:
        """Device memory that the weights take."""
        ...


@runtime_checkable
class FormsInput(LinearMethod, Protocol):
    """A linear method that begins by rounding or rearranging its input, which the norm or the activation before it
    could do in its own launch.

    The kernels of those find ``form`` in their need (:class:`octavo.operations.NormNeed`). One that knows it may return
    a tensor of this form, and ``apply`` takes both that and a plain one: which it is may differ from step to step.
    """

    form: Hashable | None  # None: a plain tensor is best


@runtime_checkable
class GatesOutput(LinearMethod, Protocol):
    """A linear method that, for fused [gate | up] projections, can do without the activation after it."""

    def apply_gated(self, x: Tensor) -> Tensor | None:
        """x [num_tokens, in_features] -> ``silu(gate) * up`` [num_tokens, out_features / 2]; None: for so many tokens
        ``apply`` and an activation take less time."""
        ...


@runtime_checkable
class AddsOutput(LinearMethod, Protocol):
    """A linear method that can add its output to a residual, which the norm after it would otherwise do."""

    def apply_onto(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """x [num_tokens, in_features] -> what is to be added to ``residual`` [num_tokens, out_features]; None: it has
        been added, in place."""
        ...


class Quantization(Protocol):
    """A weight format of linear layers. Made once per model from the checkpoint's ``quantization_config``."""

    name: ClassVar[str]

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], weights: WeightSource) -> Self:
        """Raises CheckpointError, naming the setting and the remedy, for what this format does not support.

        ``settings`` is empty when an unquantized checkpoint is to be quantized while it is loaded.
        """
        ...

    def linear(self, spec: LinearSpec, load: LayerLoader) -> LinearMethod | None:
        """Read, repack and return the layer; None: this layer is not quantized, load it plainly.

        A fused layer whose parts differ may return None only if all parts are plain; otherwise build the parts one by
        one and join them, or raise CheckpointError naming the parts.
        """
        ...


class LayerLoader(Protocol):
    """What a layer sees of the checkpoint while it is loaded. With ``--load-format dummy`` it invents the tensors."""

    placement: Placement

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor; a dummy checkpoint holds none, but invents what is asked for."""
        ...

    def tensor(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Read ``name`` onto the device. ``shape`` is the whole tensor's expected shape and is checked.

        ``index`` cuts out this rank's part; ``dtype`` converts (None: as stored). Raises CheckpointError naming
        tensor, file, both shapes and the remedy.
        """
        ...

    def kernel(self, operation: str, need: Any) -> Any:
        """The implementation chosen for ``operation``; see :mod:`octavo.operations`."""
        ...


# --- operations and kernels ------------------------------------------------------------------------------------------


class Kernel(Protocol):
    """An implementation of a named operation. What it is called with is said by the operation it implements."""

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        """What is lacking for this implementation to serve ``need``; empty: it can. Also the text of the error."""
        ...


class KernelCompiler(Protocol):
    """Makes kernels ready side by side, where launches would compile or load one after another. A context manager.

    Within it, launches of the thread that entered it are not carried out, and kernels that are not ready are noted:
    what they would have computed is undefined, so only the shapes of a trial run mean something. Leaving it waits until
    all that was noted is ready, and raises what went wrong. It may be entered again. It is made before the weights are
    loaded, and may prepare itself meanwhile.
    """

    num_compiled: int  # so far; what lay in a cache is not counted

    def __init__(self, device: torch.device, num_workers: int) -> None: ...

    @classmethod
    def missing(cls, device: torch.device) -> list[str]:
        """What is lacking for kernels on ``device``; empty: nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One attention layer as this rank computes it."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # each token sees itself and the window - 1 tokens before it
    soft_cap: float | None = None
    key_scale: float = 1.0  # an 8-bit cache holds key / key_scale
    value_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionNeed:
    """What a model asks of an attention backend."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    window: bool = False
    soft_cap: bool = False
    batch_invariant: bool = False


class AttentionBackend(ABC):
    """Paged attention for any mix of query lengths in one batch.

    ``capturable``: ``plan`` and what follows it read nothing on the host but the batch's bounds (``max_query_len``,
    ``max_seq_len``, the shapes), so that a CUDA graph of a step serves every batch within them.
    """

    name: ClassVar[str]
    capturable: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def missing(cls, need: AttentionNeed) -> list[str]:
        """What is lacking for this backend to serve ``need``; empty: it can. Also the text of the error."""

    @abstractmethod
    def __init__(self, need: AttentionNeed) -> None: ...

    @abstractmethod
    def kv_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...]:
        """The shape of one layer's cache in ``need.kv_dtype``. The first axis must be the block: copying a block
        copies one index of it."""

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> Any:
        """Once per step, before any layer: whatever all layers share. Must not wait for the device."""

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, kv: Tensor, batch: ForwardBatch, plan: Any
    ) -> Tensor:
        """Write ``key`` and ``value`` at the batch's slots into ``kv``, then attend over the whole context.

        All is written before any is read: a row may read blocks that another row of the same step fills.

        query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim], rotated already;
        returns [num_tokens, num_heads * head_dim]. Queries are the last tokens of their sequences (causal).
        """

    def forward(self, layer: Attention, qkv: Tensor, kv: Tensor, batch: ForwardBatch, plan: Any) -> Tensor:
        """From the fused projection [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] to attention's output.

        A backend that normalizes, rotates and writes in one kernel overrides this; the result must be the same.
        """
        query, key, value = layer.split_norm_rotate(qkv, batch.positions)
        return self.attend(query, key, value, layer.spec, kv, batch, plan)


# --- scheduling, caching, speculation, sampling ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits that becomes a token: whose it is, and which of its tokens it decides."""

    request: Request
    num_known: int  # tokens before the one that is decided
    drafts: Sequence[int] = ()  # the last of those tokens, as far as they are unverified drafts

    def history(self) -> list[int]:
        """All tokens before the decided one. Only for processors that declare ``needs_history``."""
        return [*self.request.tokens, *self.drafts]


class LogitsProcessor(Protocol):
    """Changes logits before sampling, for the rows that want it. Made with ``(vocab_size: int, device)``."""

    needs_history: ClassVar[bool]  # reads the tokens themselves, so a row cannot be in flight twice
    works_with_speculation: ClassVar[bool]

    def wants(self, params: SamplingParams) -> bool:
        """Whether a request with these parameters is to be processed; asked once per request."""
        ...

    def apply(self, logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
        """Change ``logits`` [num_rows, vocab_size] float32 in place; ``rows`` are (row index, row)."""
        ...


class LoadedModel(Protocol):
    """A model with its weights on the device, to be run beside the target."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def bytes_per_block(self) -> int:
        """Of all its layers' caches together."""
        ...

    @property
    def model(self) -> Model: ...

    def make_runner_beside(self, target: Runner, *, max_row_tokens: int = 2, shift: int = 0) -> Runner:
        """What runs it on the target's requests, in their slots: it reads and writes the same tokens on the device, and
        its caches lie in blocks of the same numbers. It always takes the most likely token.

        Steps of up to ``max_row_tokens`` tokens a row come often. With a ``shift`` of 1 a sequence begins with its
        second token: at each position stands the token after it.
        """
        ...


class DrafterContext(Protocol):
    """What a drafter may know and use of the engine that it is made for."""

    checkpoint: Checkpoint  # of the target, the model that verifies
    dtype: DType  # of its activations
    vocab_size: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    device: torch.device

    def choose_kernel(self, operation: str, need: Any) -> Any:
        """The class that implements an operation, one of the drafter's own too; see :mod:`octavo.operations`.

        Raises:
            ConfigError: none can.
        """
        ...

    def observed_model(self) -> ObservedModel:
        """The target, to build on its hidden states.

        Raises:
            ConfigError: it does not show them.
        """
        ...

    def record(self, recorder: HiddenStateRecorder) -> None:
        """Have the target show its hidden states to ``recorder`` from its first step on."""
        ...

    def load_model(
        self,
        model: str,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        make: Callable[[Mapping[str, Any], Builder], Model] | None = None,
    ) -> LoadedModel:
        """Another model, through the same plugins, kernels and backends as the target. A folder or a file.

        ``make`` builds it from its configuration, instead of the class that its ``architectures`` name.

        Raises:
            ConfigError: it cannot be served; says why and what to change.
        """
        ...


class Drafter(Protocol):
    """Guesses the next tokens of running sequences. How many are asked for is the core's matter, and so is verifying.

    A guess is a token id below the target's vocabulary size; a wrong one costs time, never correctness.
    """

    bytes_per_block: int  # device memory that it needs for each block of the target's cache, beside its weights

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        """Load whatever has weights; raises ConfigError, saying what to change, if it cannot work so."""

    def start(self, target: Runner) -> None:
        """Take the memory, for ``target.num_blocks`` blocks. Once, before the first draft."""
        ...

    def num_unread(self, requests: Sequence[Request]) -> Sequence[int]:
        """How many tokens of each the drafter has to read before it can guess, beside the few that each step adds. 0
        where guessing costs the same however long the sequence is. Asked often, and steps may be in flight."""
        ...

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[list[int] | None]:
        """Up to ``limits[i]`` guesses for what follows ``requests[i].tokens``; may be fewer or none. None instead of a
        list: there will be guesses after another call or more, so that their absence says nothing of their quality.

        All tokens of the requests are on the host, all requests hold a slot and blocks for their tokens and as many
        guesses, and none of them changes here. Between two calls a request may have grown by any number of tokens, and
        may have been preempted (``num_preemptions``): then its slot and its blocks are others.
        """
        ...

    def release(self, request: Request) -> None:
        """The request is finished: forget it. May come for one that was never drafted for."""
        ...
