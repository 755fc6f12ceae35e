"""What ``octavo bench kernels`` runs: each operation of :mod:`octavo.operations`, and attention, at a model's sizes.

A case has inputs, knows what they cost at least, and runs any implementation of its operation on them. Weights, caches
and logits are taken from a set that is larger than the device's caches, as a step finds them; activations are where the
kernel before would have left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.torch_backend import TorchAttention
from octavo.batch import ForwardBatch
from octavo.bench.timing import relative_error
from octavo.errors import CheckpointError
from octavo.interfaces import AttentionBackend, AttentionNeed, AttentionSpec
from octavo.layers.norm import TorchRMSNorm
from octavo.operations import ActivationNeed, LinearNeed, NormNeed, SampleNeed
from octavo.sampling import SamplingTensors, TorchLogprobs, TorchSample

ROTATION_BYTES = {"cuda": 400_000_000, "cpu": 128_000_000}  # more than caches hold
MAX_COPIES = 64
NUM_CALLS = 16
MAX_ROWS = 256  # that sampling and decoding are tried with
BLOCK_SIZE = 16
EPS = 1e-5
NUM_TOP = 20
ATTENTION = "attention"


@dataclass(frozen=True, slots=True)
class Prepared:
    """An implementation with its inputs: what is timed, one call after another, and how far off its results are."""

    calls: Sequence[Callable[[], object]]
    error: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size. ``prepare`` takes an implementation's class, which is made with ``need``."""

    operation: str
    size: str
    need: Any
    num_bytes: float  # that must be moved at least
    num_operations: float  # additions and multiplications
    prepare: Callable[[Any], Prepared]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and with which sizes: those of one model."""

    device: torch.device
    dtype: torch.dtype
    num_tokens: Sequence[int]
    context_len: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        num_tokens: Sequence[int],
        context_len: int,
    ) -> Setting:
        """From a model's ``config.json``.

        Raises:
            CheckpointError: it does not give a size.
        """

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name) or default
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(
                    f"the model's configuration has no '{name}', which its kernels' sizes follow from"
                )
            return value

        hidden, num_heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            device,
            dtype,
            num_tokens,
            context_len,
            hidden,
            size("intermediate_size"),
            num_heads,
            size("num_key_value_heads", num_heads),
            size("head_dim", hidden // num_heads),
            size("vocab_size"),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each product, fused as the builder fuses them."""
        heads = self.num_heads * self.head_dim
        return {
            "qkv": (self.hidden_size, heads + 2 * self.num_kv_heads * self.head_dim),
            "o": (heads, self.hidden_size),
            "gate_up": (self.hidden_size, 2 * self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
            "lm_head": (self.hidden_size, self.vocab_size),
        }

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def num_copies(self, num_bytes: float) -> int:
        """How many inputs of a size must take turns for none to be found in a cache."""
        return max(2, min(MAX_COPIES, round(ROTATION_BYTES[self.device.type] / num_bytes)))


OPERATIONS = ("rms_norm", "linear", "silu_and_mul", ATTENTION, "sample", "logprobs")


def cases(setting: Setting, operation: str) -> Iterator[Case]:
    """Those of one of :data:`OPERATIONS`; a plugin's operations come by the hook ``octavo_kernel_benchmarks``."""
    rows = [num_tokens for num_tokens in setting.num_tokens if num_tokens <= MAX_ROWS]
    match operation:
        case "rms_norm":
            yield from (rms_norm(setting, num_tokens) for num_tokens in setting.num_tokens)
        case "linear":
            yield from (linear(setting, name, num) for name in setting.linears for num in setting.num_tokens)
        case "silu_and_mul":
            yield from (silu_and_mul(setting, num_tokens) for num_tokens in setting.num_tokens)
        case "attention":
            yield from (attention(setting, num_rows, 1, setting.context_len) for num_rows in rows)
            yield from (attention(setting, 1, num, num) for num in setting.num_tokens if num > 1)
        case "sample":
            yield from (sample(setting, choice, num_rows) for choice in CHOICES for num_rows in rows)
        case "logprobs":
            yield from (logprobs(setting, num_rows) for num_rows in rows)


def rms_norm(setting: Setting, num_tokens: int) -> Case:
    """The addition of the residual and the norm of the sum, in one."""
    need = NormNeed(setting.device, setting.dtype, setting.hidden_size)
    x, residual = setting.randn(num_tokens, need.size), setting.randn(num_tokens, need.size)
    weight = setting.randn(need.size)

    def prepare(kernel: Any) -> Prepared:
        made = kernel(need)

        def error() -> float:
            right, _ = TorchRMSNorm(need).add(x.float(), residual.float(), weight.float(), EPS)
            return relative_error(made.add(x.clone(), residual.clone(), weight, EPS)[0], right)

        return Prepared([partial(made.add, x.clone(), residual.clone(), weight, EPS)] * NUM_CALLS, error)

    return Case("rms_norm", str(num_tokens), need, 4 * x.nbytes, 0, prepare)


def silu_and_mul(setting: Setting, num_tokens: int) -> Case:
    """The gated activation of a fused [gate | up] projection."""
    need = ActivationNeed(setting.device, setting.dtype, setting.intermediate_size)
    gate_up = setting.randn(num_tokens, 2 * need.size)

    def prepare(kernel: Any) -> Prepared:
        made = kernel(need)

        def error() -> float:
            gate, up = gate_up.float().chunk(2, dim=-1)
            return relative_error(made(gate_up), F.silu(gate) * up)

        return Prepared([partial(made, gate_up)] * NUM_CALLS, error)

    return Case("silu_and_mul", str(num_tokens), need, 1.5 * gate_up.nbytes, 0, prepare)


def linear(setting: Setting, name: str, num_tokens: int) -> Case:
    """One of the products of a layer, or the head's, without a bias."""
    num_in, num_out = setting.linears[name]
    need = LinearNeed(setting.device, setting.dtype, num_in, num_out)
    x = setting.randn(num_tokens, num_in)
    weight = setting.randn(num_out, num_in) * num_in**-0.5

    def prepare(kernel: Any) -> Prepared:
        layers = [kernel(need, weight.clone(), None) for _ in range(setting.num_copies(weight.nbytes))]

        def error() -> float:
            return relative_error(layers[0].apply(x), F.linear(x.float(), weight.float()))

        return Prepared([partial(layer.apply, x) for layer in layers], error)

    num_bytes = weight.nbytes + x.nbytes + num_tokens * num_out * x.element_size()
    return Case("linear", f"{name}, {num_tokens}", need, num_bytes, 2 * num_tokens * num_in * num_out, prepare)


def sample(setting: Setting, choice: str, num_rows: int) -> Case:
    """One of :data:`CHOICES`. The error is the share of rows whose token is not the plain implementation's."""
    need = SampleNeed(setting.device, setting.vocab_size)
    logits = _logits(setting, num_rows)
    tensors = CHOICES[choice](num_rows, setting.device)

    def prepare(kernel: Any) -> Prepared:
        made = kernel(need)

        def error() -> float:
            return float((made(logits[0], tensors) != TorchSample(need)(logits[0], tensors)).float().mean())

        return Prepared([partial(made, one, tensors) for one in logits], error)

    return Case("sample", f"{choice}, {num_rows}", need, logits[0].nbytes, 0, prepare)


def _greedy(num_rows: int, device: torch.device) -> SamplingTensors:
    zero = torch.zeros(num_rows, device=device)
    return SamplingTensors(zero, zero, all_greedy=True)


def _drawn(num_rows: int, device: torch.device) -> SamplingTensors:
    return SamplingTensors(torch.ones(num_rows, device=device), torch.rand(num_rows, device=device))


def _filtered(num_rows: int, device: torch.device) -> SamplingTensors:
    top_k = torch.full((num_rows,), 50, device=device)
    return replace(_drawn(num_rows, device), top_k=top_k, top_p=torch.full((num_rows,), 0.9, device=device))


CHOICES: Mapping[str, Callable[[int, torch.device], SamplingTensors]] = {
    "greedy": _greedy,
    "all": _drawn,
    "top-k, top-p": _filtered,
}
"""How a token is chosen: the most likely one; drawn from all; drawn from the most likely ones."""


def logprobs(setting: Setting, num_rows: int) -> Case:
    """The log-probability of a token and those of the most likely ones, whose error is told."""
    need = SampleNeed(setting.device, setting.vocab_size)
    logits = _logits(setting, num_rows)
    chosen = torch.randint(setting.vocab_size, (num_rows,), device=setting.device)
    num_top = min(NUM_TOP, setting.vocab_size)

    def prepare(kernel: Any) -> Prepared:
        made = kernel(need)

        def error() -> float:
            right = TorchLogprobs(need)(logits[0], chosen, num_top)
            return relative_error(made(logits[0], chosen, num_top)[3], right[3])

        return Prepared([partial(made, one, chosen, num_top) for one in logits], error)

    return Case("logprobs", f"top {num_top}, {num_rows}", need, logits[0].nbytes, 0, prepare)


def _logits(setting: Setting, num_rows: int) -> list[Tensor]:
    """[num_rows, vocab_size] float32 each."""
    logits = 3 * torch.randn(num_rows, setting.vocab_size, device=setting.device)
    return [logits.clone() for _ in range(min(NUM_CALLS, setting.num_copies(logits.nbytes)))]


def attention(setting: Setting, num_rows: int, query_len: int, context_len: int) -> Case:
    """The write of keys and values and the attention of ``query_len`` tokens in each of ``num_rows`` sequences, which
    are the last of ``context_len``. The error is that of up to four rows and 256 tokens of context."""
    need = AttentionNeed(
        device=setting.device,
        dtype=setting.dtype,
        kv_dtype=setting.dtype,
        block_size=BLOCK_SIZE,
        head_dim=setting.head_dim,
        num_heads=setting.num_heads,
        num_kv_heads=setting.num_kv_heads,
    )
    spec = AttentionSpec(0, need.num_heads, need.num_kv_heads, need.head_dim, scale=need.head_dim**-0.5)
    batch = paged_batch(setting.device, num_rows, query_len, context_len)
    heads = _Heads.random(setting, batch.num_tokens)
    kv_bytes = num_rows * context_len * 2 * need.num_kv_heads * need.head_dim * need.kv_dtype.itemsize
    pairs = num_rows * query_len * (context_len - (query_len - 1) / 2)

    def prepare(backend: Any) -> Prepared:
        made = backend(need)
        shape = made.kv_shape(spec, batch.block_tables.numel())
        caches = [setting.randn(*shape) for _ in range(min(8, setting.num_copies(kv_bytes)))]
        plan = made.plan(batch)

        def error() -> float:
            few, length = min(num_rows, 4), min(context_len, 256)
            steps = [paged_batch(setting.device, few, length, length)]
            steps += [paged_batch(setting.device, few, query_len, length)] if query_len < length else []
            inputs = [_Heads.random(setting, step.num_tokens) for step in steps]
            exact = TorchAttention(replace(need, dtype=torch.float32, kv_dtype=torch.float32))
            right = _attend(exact, spec, steps, [one.float() for one in inputs], torch.float32)
            return relative_error(_attend(made, spec, steps, inputs, need.kv_dtype), right)

        return Prepared([partial(made.attend, *heads.all, spec, kv, batch, plan) for kv in caches], error)

    size = f"{num_rows} x {query_len} of {context_len}"
    num_operations = 4 * pairs * need.num_heads * need.head_dim
    return Case(ATTENTION, size, need, kv_bytes + 2 * heads.query.nbytes, num_operations, prepare)


@dataclass(frozen=True, slots=True)
class _Heads:
    """What attention takes."""

    query: Tensor  # [num_tokens, num_heads, head_dim]
    key: Tensor  # [num_tokens, num_kv_heads, head_dim]
    value: Tensor  # [num_tokens, num_kv_heads, head_dim]

    @classmethod
    def random(cls, setting: Setting, num_tokens: int) -> _Heads:
        counts = (setting.num_heads, setting.num_kv_heads, setting.num_kv_heads)
        return cls(*(setting.randn(num_tokens, count, setting.head_dim) for count in counts))

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def float(self) -> _Heads:
        return _Heads(self.query.float(), self.key.float(), self.value.float())


def _attend(
    backend: AttentionBackend,
    spec: AttentionSpec,
    steps: Sequence[ForwardBatch],
    inputs: Sequence[_Heads],
    kv_dtype: torch.dtype,
) -> Tensor:
    """The last step's output, the others having filled the cache."""
    shape = backend.kv_shape(spec, steps[0].block_tables.numel())
    kv = torch.zeros(shape, dtype=kv_dtype, device=steps[0].slots.device)
    outputs = [
        backend.attend(*heads.all, spec, kv, step, backend.plan(step))
        for step, heads in zip(steps, inputs, strict=True)
    ]
    return outputs[-1]


def paged_batch(device: torch.device, num_rows: int, query_len: int, context_len: int) -> ForwardBatch:
    """Rows of equal lengths, whose blocks lie scattered over a cache that just holds them; always in the same way."""
    num_blocks = -(-context_len // BLOCK_SIZE)
    order = torch.randperm(num_rows * num_blocks, generator=torch.Generator().manual_seed(0))
    tables = order.view(num_rows, num_blocks)
    positions = torch.arange(context_len - query_len, context_len)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    num_tokens = num_rows * query_len
    return ForwardBatch(
        tokens=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=positions.repeat(num_rows).to(device),
        query_start=torch.arange(0, num_tokens + 1, query_len, dtype=torch.int32, device=device),
        seq_lens=torch.full((num_rows,), context_len, dtype=torch.int32, device=device),
        block_tables=tables.int().to(device),
        slots=slots.flatten().to(device),
        logit_rows=torch.arange(num_tokens, device=device),
        max_query_len=query_len,
        max_seq_len=context_len,
        num_decodes=num_rows if query_len == 1 else 0,
        query_lens=[query_len] * num_rows,
        context_lens=[context_len] * num_rows,
    )
