"""From a configuration to a running engine: what is needed is found out once, then built in the engine's process."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from octavo.architectures import choose_model
from octavo.attention.registry import choose_backend
from octavo.blocks import BlockManager
from octavo.config import DType, EngineConfig
from octavo.engine import Engine
from octavo.errors import CheckpointError, ConfigError
from octavo.graphs import StepShapes
from octavo.hooks import KernelProvider, Provider
from octavo.interfaces import (
    AttentionBackend,
    AttentionNeed,
    AttentionSpec,
    Checkpoint,
    Drafter,
    DrafterContext,
    HiddenStateRecorder,
    KernelCompiler,
    LogitsProcessor,
    Model,
    ObservedModel,
    Placement,
)
from octavo.layers.activation import TorchSiluAndMul
from octavo.layers.builder import Builder
from octavo.layers.linear import TorchLinear
from octavo.layers.norm import TorchRMSNorm
from octavo.layers.rotary import longest_context
from octavo.loader import (
    CheckpointLoader,
    DummyLoader,
    HuggingFaceFolder,
    NoWeights,
    choose_dtype,
    open_checkpoint,
    resolve_model_path,
)
from octavo.memory import (
    GIB,
    Activations,
    MemoryBudget,
    decode_step,
    largest_step,
    measure_peak,
    sampling_step,
    usual_steps,
)
from octavo.messages import EngineInfo
from octavo.operations import Operations, SampleNeed
from octavo.plugins import Manifest, PluginHost, Selection, select
from octavo.policies import BUILTIN as BUILTIN_POLICIES
from octavo.quantization import needed_plugins, resolve_quantization
from octavo.runner import Runner
from octavo.sampling import BUILTIN_LOGPROBS, BUILTIN_SAMPLE, make_processors
from octavo.scheduler import Scheduler
from octavo.speculation import AdaptiveController, FixedController, Speculation
from octavo.text import TextProcessor, collect_eos_token_ids

logger = logging.getLogger(__name__)

UNKNOWN_CONTEXT = 2048  # tokens, of a model that does not say how many it was made for
MAX_COMPILE_WORKERS = 16  # unless more are asked for: there are some dozens of kernels
GRAPHS_RESERVE = 512 * 1024**2  # what captured graphs take beside activations: workspaces and kernels' arguments

BUILTIN_KERNELS = (
    KernelProvider("torch", TorchRMSNorm, priority=-100, operation="rms_norm"),
    KernelProvider("torch", TorchSiluAndMul, priority=-100, operation="silu_and_mul"),
    KernelProvider("torch", TorchLinear, priority=-100, operation="linear"),
    BUILTIN_SAMPLE,
    BUILTIN_LOGPROBS,
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the parent process found out: the files, the plugins, and a configuration without open questions of
    those that it can answer (where the model lies, how long a context may be)."""

    config: EngineConfig
    manifest: Manifest
    host: PluginHost
    checkpoint: Checkpoint
    model_config: Mapping[str, Any]


def resolve(config: EngineConfig) -> Resolved:
    """Find the model's files, choose the plugins, fill in what the model decides.

    Raises:
        ConfigError: names what cannot work and what to change; PluginError and CheckpointError are kinds of it.
    """
    path = resolve_model_path(config.model, config.revision, weights=config.load_format != "dummy")
    selection = Selection.parse(config.plugins)
    needed: dict[str, str] = {}
    if path.is_file():
        # formats are activated by their suffix: model.gguf needs the plugin "gguf"
        needed[path.suffix.removeprefix(".")] = f"{path.name} is not a folder in Hugging Face's format"
    draft_path = _draft_path(config)
    if draft_path is not None and draft_path.is_file():
        needed[draft_path.suffix.removeprefix(".")] = f"{draft_path.name} is not a folder in Hugging Face's format"
    host = PluginHost(select(selection, needed, prefer=config.prefer), prefer=config.prefer)
    checkpoint = open_checkpoint(path, [provider.resolve() for provider in host.weight_formats().values()])
    model_config = {**checkpoint.config(), **config.hf_overrides}
    more = needed_plugins(checkpoint, config.quantization, host.quantizations())
    if config.speculative.drafter is not None and config.speculative.drafter not in host.drafters():
        more["speculative"] = f"speculation by {config.speculative.drafter} is configured"
    if draft_path is not None:
        draft = open_checkpoint(draft_path, [provider.resolve() for provider in host.weight_formats().values()])
        more.update(needed_plugins(draft, config.speculative.quantization, host.quantizations()))
    if more:
        host = PluginHost(select(selection, {**needed, **more}, prefer=config.prefer), prefer=config.prefer)
    if config.speculative.drafter is not None:
        _named(host.drafters(), config.speculative.drafter, "drafter")
    resolved = replace(
        config,
        model=str(path),
        max_model_len=_max_model_len(config, model_config),
        speculative=replace(config.speculative, model=str(draft_path) if draft_path else None),
    )
    host.check_capabilities(_capabilities(resolved))
    host.check_config(resolved)
    return _resolved(resolved, host.manifest, host, checkpoint)


def _draft_path(config: EngineConfig) -> Path | None:
    model = config.speculative.model
    if model is None:
        return None
    return resolve_model_path(model, weights=config.load_format != "dummy")


def reproduce(config: EngineConfig, manifest: Manifest, host: PluginHost) -> Resolved:
    """The same in the engine's process, from what the parent resolved."""
    checkpoint = open_checkpoint(
        resolve_model_path(config.model), [provider.resolve() for provider in host.weight_formats().values()]
    )
    return _resolved(config, manifest, host, checkpoint)


def _resolved(config: EngineConfig, manifest: Manifest, host: PluginHost, checkpoint: Checkpoint) -> Resolved:
    return Resolved(config, manifest, host, checkpoint, {**checkpoint.config(), **config.hf_overrides})


def make_text(resolved: Resolved, *, chat_template: str | None = None) -> TextProcessor:
    """The tokenizer: the model's own, unless ``config.tokenizer`` names another file or folder.

    A sequence ends with whatever the tokenizer, the model's configuration or its generation configuration says.
    """
    named = resolved.config.tokenizer
    if named is None:
        tokenizer = resolved.checkpoint.tokenizer()
    else:
        path = resolve_model_path(named, weights=False)
        formats = [provider.resolve() for provider in resolved.host.weight_formats().values()]
        source = HuggingFaceFolder(path) if path.is_dir() else open_checkpoint(path, formats)
        tokenizer = source.tokenizer()
    ends = collect_eos_token_ids(tokenizer, resolved.model_config, resolved.checkpoint.generation_config())
    vocab_size = int(resolved.model_config["vocab_size"])
    return TextProcessor(tokenizer, vocab_size, eos_token_ids=ends, chat_template=chat_template)


def _max_model_len(config: EngineConfig, model_config: Mapping[str, Any]) -> int:
    """What was asked for, within what the model's positions and their stretching allow; else what it was made for.

    A sliding window bounds what a layer looks back at, not how long a context may be.
    """
    wanted, own = config.max_model_len, model_config.get("max_position_embeddings")
    if own is None:
        if wanted is None:
            logger.warning("the model does not say how long a context may be; --max-model-len %d", UNKNOWN_CONTEXT)
        return wanted or UNKNOWN_CONTEXT
    if not isinstance(own, int) or own < 1:
        raise CheckpointError(
            f"max_position_embeddings must be a whole number above 0, not {own!r}; see --hf-overrides"
        )
    longest = longest_context(model_config, own)
    if wanted is None:
        if longest > own:
            logger.info("a context holds %d tokens; rope scaling allows --max-model-len %d", own, longest)
        return own
    if wanted > longest:
        scaling = f'{{"rope_scaling": {{"rope_type": "yarn", "factor": {math.ceil(wanted / own)}.0}}}}'
        raise ConfigError(
            f"--max-model-len {wanted}: the model was made for {longest} tokens; use at most that, or stretch its "
            f"positions with --hf-overrides '{scaling}'"
        )
    return wanted


def _capabilities(config: EngineConfig) -> list[str]:
    used = {
        "chunked-prefill": True,
        "prefix-caching": config.enable_prefix_caching,
        "speculation": config.speculative.enabled,
        "tensor-parallel": config.tensor_parallel_size > 1,
        "batch-invariant": config.batch_invariant,
        "fp8-kv-cache": config.kv_cache_dtype == "fp8",
    }
    return [name for name, on in used.items() if on]


def build_engine(resolved: Resolved) -> Engine:
    """Load the model, take the memory, put the parts together. Runs in the engine's process.

    Raises:
        ConfigError: names what cannot work and what to change.
    """
    config, host = resolved.config, resolved.host
    clock = _Clock()
    device = choose_device(config.device)
    set_num_threads(config, device)
    operations = Operations(BUILTIN_KERNELS, host.kernels(), config.kernels)
    max_model_len = config.max_model_len
    assert max_model_len is not None  # resolve() filled it in
    num_drafts = config.speculative.num_tokens if config.speculative.enabled else 0
    max_num_batched_tokens = config.max_num_batched_tokens or (8192 if device.type == "cuda" else 2048)
    max_num_batched_tokens = max(max_num_batched_tokens, config.max_num_seqs)
    loader = _ModelLoader(config, host, device, operations)
    compilers = make_compilers(host, device, config.compile_workers)

    with clock.measure("weights"):
        target = loader.load(resolved.checkpoint, resolved.model_config, config.dtype, config.quantization)
        context = _DrafterContext(loader, target, max_num_batched_tokens)
        drafter = _drafter(config, host, context)
    logger.info("weights: %.2f GiB on %s, %s", target.weight_bytes / GIB, device, target.placement.dtype)
    logger.info("kernels: %s", ", ".join(f"{op}: {'/'.join(sorted(k))}" for op, k in sorted(operations.log.items())))
    for operation, reasons in sorted(operations.passed_over.items()):
        if reasons:
            logger.info("passed over for %s: %s", operation, "; ".join(reasons))

    processors = make_processors(list(host.logits_processors().values()), target.vocab_size, device)
    use_graphs = device.type == "cuda" and target.backend.capturable and not config.enforce_eager
    if device.type == "cuda":
        with clock.measure("kernels"):
            compile_kernels(compilers, target, max_num_batched_tokens)
    with clock.measure("memory"):
        if device.type == "cuda":
            activations = _measure_activations(target, max_num_batched_tokens, num_drafts, use_graphs)
        else:
            activations = estimate_activations(target.vocab_size, max_num_batched_tokens, config, num_drafts)
        budget = plan_memory(
            config,
            device,
            target.weight_bytes,
            target.bytes_per_block + (drafter.bytes_per_block if drafter else 0),
            activations,
        )
        logger.info(budget.table())
    with clock.measure("graphs"):
        runner = target.make_runner(
            budget.num_blocks,
            processors,
            use_graphs=use_graphs,
            num_drafts=num_drafts,
            recorder=context.recorder,
        )
        if drafter is not None:
            drafter.start(runner)

    scheduler = Scheduler(
        BlockManager(budget.num_blocks, config.block_size, _prefix_cache(config, host)),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_partial_prefills=config.max_num_partial_prefills,
        policy=_policy(config, host),
    )
    speculation = None
    if drafter is not None:
        _check_speculation(processors)
        controller = (
            FixedController(num_drafts)
            if config.speculative.fixed
            else AdaptiveController(
                num_drafts,
                # at least 1: a model may hold weights that its builder does not know of
                draft_cost=context.step_bytes / max(1, target.step_bytes),
                reading_cost=context.layer_bytes / max(1, target.layer_bytes),
            )
        )
        speculation = Speculation(drafter, controller, scheduler, num_drafts)
    info = EngineInfo(
        model=config.model,
        architecture=str((resolved.model_config.get("architectures") or ["?"])[0]),
        dtype=str(target.placement.dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=target.vocab_size,
        max_model_len=max_model_len,
        num_blocks=budget.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        attention_backend=target.backend.name,
        weight_bytes=target.weight_bytes,
        startup_seconds=clock.seconds,
    )
    return Engine(
        scheduler,
        runner,
        info,
        speculation=speculation,
        overlap=device.type == "cuda" if config.overlap is None else config.overlap,
    )


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    """A model with its weights on the device, and all that its runner is made of."""

    config: EngineConfig
    checkpoint: Checkpoint
    model: Model
    backend: AttentionBackend
    specs: Sequence[AttentionSpec]
    placement: Placement
    kv_dtype: torch.dtype
    vocab_size: int
    weight_bytes: int
    step_bytes: int  # of weights that a step of few tokens reads
    layer_bytes: int  # the same without the output head, as where no token is sampled
    bytes_per_block: int
    sample: Any
    logprobs: Any

    def make_runner(
        self,
        num_blocks: int,
        processors: Sequence[LogitsProcessor] = (),
        *,
        use_graphs: bool = False,
        num_drafts: int = 0,
        recorder: HiddenStateRecorder | None = None,
        beside: Runner | None = None,
        shift: int = 0,
    ) -> Runner:
        assert self.config.max_model_len is not None
        return Runner(
            self.model,
            self.backend,
            self.specs,
            self.placement,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            kv_dtype=self.kv_dtype,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            vocab_size=self.vocab_size,
            processors=processors,
            sample=self.sample,
            logprobs=self.logprobs,
            use_graphs=use_graphs,
            num_drafts=num_drafts,
            recorder=recorder,
            beside=beside,
            shift=shift,
        )

    def make_runner_beside(self, target: Runner, *, max_row_tokens: int = 2, shift: int = 0) -> Runner:
        use_graphs = target.graphs is not None and self.backend.capturable
        return self.make_runner(
            target.num_blocks, use_graphs=use_graphs, num_drafts=max_row_tokens - 1, beside=target, shift=shift
        )


@dataclass(frozen=True, slots=True)
class _ModelLoader:
    """Loads models that run side by side: same plugins, kernels, device and sizes."""

    config: EngineConfig
    host: PluginHost
    device: torch.device
    operations: Operations

    def load(
        self,
        checkpoint: Checkpoint,
        model_config: Mapping[str, Any],
        dtype: str,
        quantization: str | None,
        make: Callable[[Mapping[str, Any], Builder], Model] | None = None,
    ) -> _LoadedModel:
        config, host, device = self.config, self.host, self.device
        assert config.max_model_len is not None
        placement = Placement(device, choose_dtype(model_config, dtype, device), config.batch_invariant)
        dummy = config.load_format == "dummy"
        weights = NoWeights() if dummy else checkpoint.weights()
        load = (
            DummyLoader(placement, self.operations) if dummy else CheckpointLoader(weights, placement, self.operations)
        )
        method = resolve_quantization(checkpoint, quantization, host.quantizations(), weights)
        if method is not None and config.batch_invariant:
            raise ConfigError(
                f"--batch-invariant does not cover quantized weights ({method.name}); leave one of them out"
            )
        build = Builder(load, max_model_len=config.max_model_len, quantization=method)
        model = (make or choose_model(model_config, host.models()))(model_config, build)
        first = build.attention_specs[0]
        kv_dtype = choose_kv_dtype(config.kv_cache_dtype, placement.dtype)
        need = AttentionNeed(
            device=device,
            dtype=placement.dtype,
            kv_dtype=kv_dtype,
            block_size=config.block_size,
            head_dim=first.head_dim,
            num_heads=first.num_heads,
            num_kv_heads=first.num_kv_heads,
            window=any(spec.window is not None for spec in build.attention_specs),
            soft_cap=any(spec.soft_cap is not None for spec in build.attention_specs),
            batch_invariant=config.batch_invariant,
        )
        backend = choose_backend(host.attention_backends().values(), need, config.attention_backend)
        vocab_size = int(model_config["vocab_size"])
        sample_need = SampleNeed(device, vocab_size)
        return _LoadedModel(
            config=config,
            checkpoint=checkpoint,
            model=model,
            backend=backend,
            specs=build.attention_specs,
            placement=placement,
            kv_dtype=kv_dtype,
            vocab_size=vocab_size,
            weight_bytes=build.num_bytes(),
            step_bytes=build.num_bytes_read(with_head=True),
            layer_bytes=build.num_bytes_read(with_head=False),
            bytes_per_block=sum(
                torch.Size(backend.kv_shape(spec, 1)).numel() * kv_dtype.itemsize for spec in build.attention_specs
            ),
            sample=self.operations.choose("sample", sample_need)(sample_need),
            logprobs=self.operations.choose("logprobs", sample_need)(sample_need),
        )


class _DrafterContext:
    """See :class:`octavo.interfaces.DrafterContext`."""

    def __init__(self, loader: _ModelLoader, target: _LoadedModel, max_num_batched_tokens: int) -> None:
        assert loader.config.max_model_len is not None
        self._loader = loader
        self.checkpoint = target.checkpoint
        self._model = target.model
        self.dtype = cast("DType", str(target.placement.dtype).removeprefix("torch."))
        self.recorder: HiddenStateRecorder | None = None
        self.step_bytes = 0  # of what was loaded
        self.layer_bytes = 0
        self.vocab_size = target.vocab_size
        self.block_size = loader.config.block_size
        self.max_model_len = loader.config.max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.device = loader.device

    def choose_kernel(self, operation: str, need: Any) -> Any:
        return self._loader.operations.choose(operation, need)

    def observed_model(self) -> ObservedModel:
        if not isinstance(self._model, ObservedModel):
            raise ConfigError(
                f"{type(self._model).__name__} does not show its hidden states, which this drafter builds on; use "
                f"--speculative-method ngram, or draft-model with a small model of the same family"
            )
        return self._model

    def record(self, recorder: HiddenStateRecorder) -> None:
        self.recorder = recorder

    def load_model(
        self,
        model: str,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        make: Callable[[Mapping[str, Any], Builder], Model] | None = None,
    ) -> _LoadedModel:
        formats = [provider.resolve() for provider in self._loader.host.weight_formats().values()]
        checkpoint = open_checkpoint(resolve_model_path(model), formats)
        loaded = self._loader.load(checkpoint, checkpoint.config(), dtype, quantization, make)
        self.step_bytes += loaded.step_bytes
        self.layer_bytes += loaded.layer_bytes
        return loaded


# --- the parts -------------------------------------------------------------------------------------------------------


def choose_device(wanted: str) -> torch.device:
    """The device that was asked for, else the GPU if there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device '{wanted}' is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch finds no GPU; use --device cpu")
    return device


def set_num_threads(config: EngineConfig, device: torch.device) -> None:
    """The threads that torch computes with on a CPU: as configured, else OMP_NUM_THREADS, else one per core."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_cores())


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_kv_dtype(wanted: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that keys and values are kept in."""
    known = {
        "auto": dtype,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "fp8": torch.float8_e4m3fn,
    }
    if wanted not in known:
        raise ConfigError(f"kv_cache_dtype '{wanted}' is not supported; known: {', '.join(known)}")
    return known[wanted]


def make_compilers(host: PluginHost, device: torch.device, num_workers: int | None) -> list[KernelCompiler]:
    """The compilers of all plugins that have kernels for ``device``; None: with a thread for each core, at most 16.

    Raises:
        ConfigError: threads were asked for, and there is nothing for them to do; each compiler's reasons.
    """
    if num_workers == 0:
        return []
    num_threads = num_workers or min(num_cores(), MAX_COMPILE_WORKERS)
    made: list[KernelCompiler] = []
    reasons: list[str] = []
    for provider in host.kernel_compilers().values():
        lacking = provider.lacking() or provider.resolve().missing(device)
        if lacking:
            reasons.append(f"{provider.name}: {'; '.join(lacking)}")
        else:
            made.append(provider.resolve()(device, num_threads))
    if not made and num_workers is not None:
        why = "".join(f"\n  {reason}" for reason in reasons)
        raise ConfigError(f"compile_workers is {num_workers}, but no plugin compiles for {device}; use 0{why}")
    return made


def compile_kernels(compilers: Sequence[KernelCompiler], target: _LoadedModel, max_num_batched_tokens: int) -> None:
    """Launch the usual steps, for what only a first launch does. Most of that is compiling; compilers do it at once.

    What some step lacks does not follow from what another one does: a cache may hold a part of the kernels.
    """
    config = target.config
    assert config.max_model_len is not None
    started = time.perf_counter()
    num_blocks = 512 // config.block_size
    runner = target.make_runner(num_blocks)
    limits = (config.max_num_seqs, max_num_batched_tokens, config.max_model_len, config.block_size)
    with ExitStack() as stack:
        for compiler in compilers:
            stack.enter_context(compiler)
        steps = usual_steps(*limits, num_blocks)
        steps += [decode_step(rows, config.block_size) for rows in (32, 64) if rows < config.max_num_seqs]
        # what takes longest to compile begins first: filters, then attention for long rows
        steps.sort(key=lambda step: -step.rows[-1].num_tokens)
        for step in (sampling_step(config.max_num_seqs, config.block_size), *steps):
            runner.launch(step)
    num_compiled = sum(compiler.num_compiled for compiler in compilers)
    if num_compiled:
        logger.info("compiled %d kernels in %.1f s", num_compiled, time.perf_counter() - started)


def _measure_activations(
    target: _LoadedModel, max_num_batched_tokens: int, num_drafts: int, use_graphs: bool
) -> Activations:
    """On a GPU: what the largest step takes, and what a captured one does."""
    config, device = target.config, target.placement.device
    assert config.max_model_len is not None
    largest = largest_step(
        config.max_num_seqs, max_num_batched_tokens, config.max_model_len, config.block_size, num_drafts
    )
    num_blocks = len(largest.rows[0].request.blocks)
    peak = measure_peak(device, lambda: target.make_runner(num_blocks).launch(largest))
    if not use_graphs:
        return Activations(peak)
    runner = target.make_runner(num_blocks)
    decode = decode_step(config.max_num_seqs, config.block_size)
    graphs = measure_peak(device, lambda: runner.launch(decode))
    if num_drafts:  # a captured step with drafts has more tokens, and a draft model has graphs of its own
        num_tokens = min(config.max_num_seqs * (1 + num_drafts), StepShapes.MAX_SHORT_TOKENS)
        graphs += graphs * num_tokens // config.max_num_seqs
    return Activations(peak, graphs + GRAPHS_RESERVE)


def estimate_activations(
    vocab_size: int, max_num_batched_tokens: int, config: EngineConfig, num_drafts: int
) -> Activations:
    """From above, where it cannot be measured: logits dominate."""
    logits = min(config.max_num_seqs * (num_drafts + 1), max_num_batched_tokens) * vocab_size * 4 * 4
    return Activations(logits + max_num_batched_tokens * 64 * 1024)


def plan_memory(
    config: EngineConfig, device: torch.device, weights: int, block_bytes: int, activations: Activations
) -> MemoryBudget:
    """How many blocks there are. On a CPU a fixed size is set apart; on a GPU, what is left of its memory."""
    assert config.max_model_len is not None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the measurement left is free again
        free, total = torch.cuda.mem_get_info(device)
        limit = int(total * config.gpu_memory_utilization)
        others = max(0, total - free - torch.cuda.memory_reserved(device))
        weights = torch.cuda.memory_allocated(device)
        knob = "--gpu-memory-utilization"
    else:
        total = _host_memory()
        limit = int(config.cpu_kv_cache_gib * GIB) + weights + activations.step
        others = 0
        knob = "--cpu-kv-cache-gib"
    return MemoryBudget.plan(
        device=str(device),
        total=total,
        limit=limit,
        used_by_others=others,
        weights=weights,
        activations=activations,
        block_bytes=block_bytes,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        num_blocks=config.num_blocks,
        knob=knob,
    )


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _prefix_cache(config: EngineConfig, host: PluginHost) -> Any:
    providers = host.prefix_caches()
    if not config.enable_prefix_caching or not providers:
        return None
    chosen = _named(providers, config.prefix_cache, "prefix cache") if config.prefix_cache else _best(providers)
    return chosen.resolve()(config.block_size)


def _policy(config: EngineConfig, host: PluginHost) -> Any:
    providers = {**{provider.name: provider for provider in BUILTIN_POLICIES}, **host.scheduling_policies()}
    return _named(providers, config.scheduling_policy, "scheduling policy").resolve()()


def _drafter(config: EngineConfig, host: PluginHost, context: DrafterContext) -> Drafter | None:
    method = config.speculative.drafter
    if method is None:
        return None
    made: Drafter = _named(host.drafters(), method, "drafter").resolve()(config, context)
    return made


def _check_speculation(processors: Sequence[LogitsProcessor]) -> None:
    for processor in processors:
        if not processor.works_with_speculation:
            raise ConfigError(
                f"the logits processor {type(processor).__name__} does not work with speculation; leave out "
                f"speculation or the plugin that provides the processor"
            )


def _named(providers: Mapping[str, Provider], name: str, what: str) -> Provider:
    if name not in providers:
        raise ConfigError(f"no {what} is called '{name}'; there are: {', '.join(providers)}")
    return providers[name]


def _best(providers: Mapping[str, Provider]) -> Provider:
    return max(providers.values(), key=lambda provider: provider.priority)


class _Clock:
    """Where the time of the start-up goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - started
