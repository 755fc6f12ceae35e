"""What a user can set. Frozen; ``resolve`` elsewhere returns new values, nothing here is ever changed in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.errors import ConfigError

DType = Literal["auto", "float32", "float16", "bfloat16"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Which tokens are guessed ahead, and how many at most. ``method`` names a drafter that a plugin provides."""

    method: str | None = None  # a drafter's name; None: "draft-model" when a model is named, else off
    model: str | None = None
    num_tokens: int = 4
    fixed: bool = False  # always draft num_tokens, without the controller
    quantization: str | None = None
    dtype: DType = "auto"

    @property
    def drafter(self) -> str | None:
        """The name of the drafter; None: no speculation."""
        return self.method or ("draft-model" if self.model is not None else None)

    @property
    def enabled(self) -> bool:
        return self.drafter is not None

    def __post_init__(self) -> None:
        if not 1 <= self.num_tokens <= 32:
            raise ConfigError(f"num_speculative_tokens must be between 1 and 32, not {self.num_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that an engine is made of. Sizes are in tokens, blocks or requests; ``None`` means: find out.

    Raises:
        ConfigError: a value can never work, whatever the model and the machine.
    """

    model: str
    tokenizer: str | None = None  # None: the model's own
    revision: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    load_format: LoadFormat = "auto"
    quantization: str | None = None  # None: what the checkpoint says
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # None: 2048 on a CPU, 8192 on a GPU
    max_num_partial_prefills: int = 4
    scheduling_policy: str = "fcfs"

    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: float = 2.0
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    prefix_cache: str | None = None  # None: the provider of highest priority

    attention_backend: str | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)  # operation -> implementation, when one is insisted on
    overlap: bool | None = None  # launch a step before the last one is settled; None: on a GPU
    enforce_eager: bool = False
    compile_workers: int | None = None  # threads that compile kernels at start; None: one a core; 0: no threads
    batch_invariant: bool = False
    num_threads: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    seed: int | None = None  # makes the seeds of requests that bring none reproducible; None: drawn from the system

    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    plugins: str | None = None  # the --plugins text; None: what the checkpoint and the options need
    prefer: Mapping[str, str] = field(default_factory=dict)  # provided name -> distribution, when two claim it
    plugin_options: Mapping[str, Any] = field(default_factory=dict)  # "plugin.option" -> value

    def __post_init__(self) -> None:
        positive = {
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_num_partial_prefills": self.max_num_partial_prefills,
            "num_blocks": self.num_blocks,
            "num_threads": self.num_threads,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.compile_workers is not None and self.compile_workers < 0:
            raise ConfigError(f"compile_workers must be 0 or above, not {self.compile_workers}")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, not {self.block_size}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.cpu_kv_cache_gib <= 0.0:
            raise ConfigError(f"cpu_kv_cache_gib must be above 0, not {self.cpu_kv_cache_gib}")
        if self.prefix_cache is not None and not self.enable_prefix_caching:
            raise ConfigError(
                f"prefix_cache {self.prefix_cache} contradicts enable_prefix_caching; leave one of them out"
            )
        if not self.speculative.enabled and self.speculative != SpeculativeConfig():
            raise ConfigError(
                "speculation has settings, but nothing says how tokens are guessed; add --speculative-model or "
                "--speculative-method, or leave them out"
            )
        for name, value in (
            ("tensor_parallel_size", self.tensor_parallel_size),
            ("pipeline_parallel_size", self.pipeline_parallel_size),
        ):
            if value != 1:
                raise ConfigError(f"{name} {value}: this version runs on one device only; use 1")
