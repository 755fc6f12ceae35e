"""From options to an engine: what is found out, what is chosen and logged, and what is refused with which words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch

from octavo.config import EngineConfig, SpeculativeConfig
from octavo.engine import Engine
from octavo.errors import CheckpointError, ConfigError, PluginError
from octavo.hooks import Provider
from octavo.startup import (
    Resolved,
    build_engine,
    choose_device,
    choose_kv_dtype,
    compile_kernels,
    make_compilers,
    make_text,
    reproduce,
    resolve,
)

Variant = Callable[..., Path]


@pytest.fixture
def variant(tiny_llama: Path, tmp_path: Path) -> Variant:
    """The tiny model with entries of its config.json changed; ``None`` removes one."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_llama, folder)
        file = folder / "config.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return folder

    return make


def resolved(model: Path, **options: Any) -> Resolved:
    return resolve(EngineConfig(model=str(model), **options))


def built(model: Path, **options: Any) -> Engine:
    defaults = {"dtype": "float32", "device": "cpu", "num_blocks": 64, "max_num_seqs": 8, "num_threads": 1}
    return build_engine(resolved(model, **{**defaults, **options}))


# --- the length of a context -----------------------------------------------------------------------------------------


def test_a_context_is_as_long_as_the_model_says_or_as_the_option_says_below_it(tiny_llama: Path) -> None:
    assert resolved(tiny_llama).config.max_model_len == 256
    assert resolved(tiny_llama, max_model_len=100).config.max_model_len == 100
    assert built(tiny_llama, max_model_len=100).info.max_model_len == 100


def test_more_than_the_model_was_made_for_is_refused_with_both_numbers_and_the_way_out(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-model-len 1000: the model was made for 256 tokens") as caught:
        resolved(tiny_llama, max_model_len=1000)
    advice = json.loads(str(caught.value).partition("--hf-overrides '")[2].rstrip("'"))
    assert resolved(tiny_llama, max_model_len=1000, hf_overrides=advice).config.max_model_len == 1000


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "dynamic", "factor": 3.0}, 768),
        (YARN, 1024),
        ({**YARN, "original_max_position_embeddings": 64}, 256),  # the model's own number has the factor in it
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            256,
        ),
    ],
)
def test_rope_scaling_allows_what_it_stretches_to(
    variant: Variant, scaling: dict[str, Any], longest: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = variant(rope_parameters=None, rope_scaling=scaling)
    caplog.set_level(logging.INFO)
    assert resolved(model).config.max_model_len == 256, "short contexts are as they were unless more is asked for"
    assert (f"rope scaling allows --max-model-len {longest}" in caplog.text) == (longest > 256)
    assert resolved(model, max_model_len=longest).config.max_model_len == longest
    with pytest.raises(ConfigError, match=f"made for {longest} tokens"):
        resolved(model, max_model_len=longest + 1)
    assert built(model, max_model_len=longest).info.max_model_len == longest


def test_a_sliding_window_does_not_shorten_the_context(variant: Variant) -> None:
    model = variant(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32)
    assert resolved(model).config.max_model_len == 256


def test_settings_by_layer_type_are_left_to_the_model(variant: Variant) -> None:
    layered = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}
    model = variant(rope_parameters=layered)
    assert resolved(model).config.max_model_len == 256
    with pytest.raises(ConfigError, match="made for 256"):
        resolved(model, max_model_len=257)


def test_a_model_that_does_not_say_gets_a_length_and_a_warning(
    variant: Variant, caplog: pytest.LogCaptureFixture
) -> None:
    model = variant(max_position_embeddings=None)
    assert resolved(model).config.max_model_len == 2048
    assert "does not say how long a context may be" in caplog.text
    assert resolved(model, max_model_len=5000).config.max_model_len == 5000


@pytest.mark.parametrize("value", [0, -5, 2.5, "256"])
def test_a_length_that_is_none_is_the_checkpoints_error(variant: Variant, value: Any) -> None:
    with pytest.raises(CheckpointError, match="max_position_embeddings must be a whole number above 0"):
        resolved(variant(max_position_embeddings=value))


def test_a_context_that_the_memory_does_not_hold_names_the_knobs(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="--max-model-len"):
        built(tiny_llama, num_blocks=4)


# --- the model and its plugins ---------------------------------------------------------------------------------------


def test_an_unknown_architecture_lists_the_known_ones(variant: Variant) -> None:
    model = variant(architectures=["LamaForCausalLM"])
    with pytest.raises(ConfigError) as caught:
        built(model)
    said = str(caught.value)
    assert "'LamaForCausalLM' (the nearest is LlamaForCausalLM)" in said
    for known in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "octavo_models"):
        assert known in said
    assert built(model, hf_overrides={"architectures": ["LlamaForCausalLM"]}).info.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_backend": "imaginary"}, "imaginary"),
        ({"kernels": {"linear": "imaginary"}}, "imaginary"),
        ({"scheduling_policy": "imaginary"}, "no scheduling policy is called 'imaginary'; there are: fcfs"),
        ({"prefix_cache": "imaginary"}, "no prefix cache is called 'imaginary'"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype 'int3' is not supported; known: auto"),
        ({"device": "abacus"}, "device 'abacus' is unknown; use auto, cpu or cuda"),
        ({"quantization": "imaginary"}, "imaginary"),
        ({"quantization": "fp8", "batch_invariant": True}, "--batch-invariant does not cover quantized weights"),
        ({"plugins": "imaginary"}, "imaginary"),
        ({"plugins": "no:models"}, "none \\(is the plugin 'models' left out\\?\\)"),
        ({"speculative": SpeculativeConfig(method="imaginary")}, "no drafter is called 'imaginary'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny_llama: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        built(tiny_llama, **options)


def test_a_model_that_is_nowhere_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a file or folder here nor a name on the hub"):
        resolved(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolved(empty)


def test_without_weights_only_the_configuration_is_needed(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(CheckpointError):
        built(tmp_path)
    assert built(tmp_path, load_format="dummy").info.weight_bytes == built(tiny_llama).info.weight_bytes


def test_another_process_reproduces_what_was_resolved(tiny_llama: Path) -> None:
    first = resolved(tiny_llama, hf_overrides={"rms_norm_eps": 1e-3})
    again = reproduce(first.config, first.manifest, first.host)
    assert (again.config, again.manifest) == (first.config, first.manifest)
    assert again.model_config == first.model_config
    assert again.model_config["rms_norm_eps"] == 1e-3


def test_a_plugin_that_is_needed_but_not_listed_is_named_with_the_option(variant: Variant) -> None:
    model = variant(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True})
    assert "awq" in {record.name for record in resolved(model).manifest}
    with pytest.raises(PluginError, match="awq"):
        resolved(model, plugins="no:prefix-cache,gptq")


def test_a_tokenizer_of_ones_own_replaces_the_models(variant: Variant, tiny_llama: Path) -> None:
    model = variant()
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        make_text(resolved(model))
    text = make_text(resolved(model, tokenizer=str(tiny_llama)))
    assert text.decode(text.encode("hello")) == "hello"


# --- where and in what it computes -----------------------------------------------------------------------------------


def test_the_device_is_the_one_that_was_asked_for_or_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch finds no GPU; use --device cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_one_that_was_asked_for(tiny_llama: Path, dtype: str) -> None:
    assert built(tiny_llama, dtype=dtype).info.dtype == dtype


def test_keys_and_values_have_the_dtype_of_activations_unless_another_is_named() -> None:
    assert choose_kv_dtype("auto", torch.float16) is torch.float16
    assert choose_kv_dtype("fp8", torch.bfloat16) is torch.float8_e4m3fn


# --- what is told ----------------------------------------------------------------------------------------------------


def test_the_log_says_what_was_chosen_and_how_the_memory_is_used(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="octavo")
    engine = built(tiny_llama)
    for part in ("weights: 0.00 GiB on cpu, torch.float32", "kernels: ", "rms_norm: ", "linear: ", "attention backend"):
        assert part in caplog.text
    assert "keys and values (64 blocks)" in caplog.text
    assert "room for 1024 tokens in blocks of 16" in caplog.text
    assert set(engine.info.startup_seconds) == {"weights", "memory", "graphs"}
    assert all(seconds >= 0 for seconds in engine.info.startup_seconds.values())


def test_the_engine_says_what_it_is(tiny_llama: Path) -> None:
    info = built(tiny_llama, max_num_batched_tokens=4).info
    assert (info.architecture, info.dtype, info.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (info.vocab_size, info.num_blocks, info.block_size, info.max_num_seqs) == (260, 64, 16, 8)
    assert info.max_num_batched_tokens == 8, "every running sequence must have its token"


class Watching:
    """A compiler that says how many kernels it had to compile, and whether it is watching."""

    num_compiled = 0

    def __init__(self, missing: int) -> None:
        self.missing = missing
        self.watches = False

    def __enter__(self) -> Self:
        self.watches = True
        return self

    def __exit__(self, *_: object) -> None:
        self.num_compiled = self.missing
        self.watches = False


@pytest.mark.parametrize("missing", [0, 3])
def test_a_trial_run_has_the_kernels_of_all_usual_steps_compiled(
    missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="octavo")
    compiler = Watching(missing)
    watched: list[bool] = []
    runner = SimpleNamespace(launch=lambda step: watched.append(compiler.watches))
    config = EngineConfig(model="any", max_model_len=256, max_num_seqs=8)
    compile_kernels([compiler], SimpleNamespace(config=config, make_runner=lambda num_blocks: runner), 2048)
    assert all(watched)
    assert len(watched) > 10
    assert ("compiled 3 kernels" in caplog.text) == (missing == 3)
    assert not compiler.watches


class Counting:
    """A compiler for any device that remembers how many threads it was given."""

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self.num_workers = num_workers

    @classmethod
    def missing(cls, device: torch.device) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("wanted", "num_cores", "made"), [(None, 2, [2]), (None, 200, [16]), (200, 2, [200]), (0, 2, [])]
)
def test_kernels_are_compiled_in_a_thread_for_each_core_unless_told_otherwise(
    wanted: int | None, num_cores: int, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.startup.num_cores", lambda: num_cores)
    host = SimpleNamespace(kernel_compilers=lambda: {"counting": Provider("counting", Counting)})
    compilers = make_compilers(host, torch.device("cpu"), wanted)
    assert [compiler.num_workers for compiler in compilers] == made


def test_workers_that_have_nothing_to_compile_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"compile_workers is 4, but no plugin compiles for cpu; use 0\n  triton: "):
        built(tiny_llama, compile_workers=4)
    with pytest.raises(ConfigError, match="compile_workers must be 0 or above, not -1"):
        EngineConfig(model=str(tiny_llama), compile_workers=-1)
