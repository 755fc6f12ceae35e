"""Every field of the configuration has an option that reaches it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from octavo import EngineConfig, OptionGroup, SpeculativeConfig
from octavo.cli.options import (
    ENGINE_OPTIONS,
    SPECULATIVE_OPTIONS,
    engine_config,
    engine_options_given,
    engine_parser,
)
from octavo.errors import ConfigError, PluginError


def parse(*words: str, groups: Any = ()) -> EngineConfig:
    return engine_config(engine_parser(groups).parse_args(words))


def test_every_field_has_an_option_and_every_option_a_field() -> None:
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    options = {name for group in ENGINE_OPTIONS.values() for name in group}
    assert options == fields - {"model", "speculative", "plugin_options"}
    assert set(SPECULATIVE_OPTIONS) == {field.name for field in dataclasses.fields(SpeculativeConfig)}


def test_no_options_give_the_configurations_own_defaults() -> None:
    assert parse("folder") == EngineConfig(model="folder")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--dtype float16", "dtype", "float16"),
        ("--max-model-len 128", "max_model_len", 128),
        ("--max-num-seqs 3", "max_num_seqs", 3),
        ("--max-num-batched-tokens 64", "max_num_batched_tokens", 64),
        ("--gpu-memory-utilization 0.5", "gpu_memory_utilization", 0.5),
        ("--num-blocks 9", "num_blocks", 9),
        ("--num-gpu-blocks 9", "num_blocks", 9),
        ("--quantization fp8", "quantization", "fp8"),
        ("--load-format dummy", "load_format", "dummy"),
        ("--no-enable-prefix-caching", "enable_prefix_caching", False),
        ("--enforce-eager", "enforce_eager", True),
        ("--batch-invariant", "batch_invariant", True),
        ("--overlap", "overlap", True),
        ("--no-overlap", "overlap", False),
        ("--threads 2", "num_threads", 2),
        ("--seed 7", "seed", 7),
        ("--kernel linear=torch --kernel rms_norm=triton", "kernels", {"linear": "torch", "rms_norm": "triton"}),
        ("--prefer awq=acme", "prefer", {"awq": "acme"}),
        ("--plugins awq,no:triton", "plugins", "awq,no:triton"),
        ('--hf-overrides {"a":[1]}', "hf_overrides", {"a": [1]}),
        ("--kv-cache-dtype fp8", "kv_cache_dtype", "fp8"),
        ("--attention-backend torch", "attention_backend", "torch"),
    ],
)
def test_an_option_reaches_its_field(words: str, field: str, value: object) -> None:
    config = parse("model", *words.split())
    assert config == dataclasses.replace(EngineConfig(model="model"), **{field: value})


def test_speculation_has_its_own_options() -> None:
    config = parse("model", "--speculative-model", "small", "--num-speculative-tokens", "7", "--speculative-fixed")
    assert config.speculative == SpeculativeConfig(model="small", num_tokens=7, fixed=True)


def test_one_operation_cannot_have_two_kernels() -> None:
    with pytest.raises(ConfigError, match="'linear' is set to both 'a' and 'b'"):
        parse("--kernel", "linear=a", "--kernel", "linear=b")


@pytest.mark.parametrize("words", ["--kernel linear", "--kernel =x", "--prefer x=", "--hf-overrides [1]", "--dtype x"])
def test_a_value_of_the_wrong_form_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words.split())
    assert words.split()[0] in capsys.readouterr().err


def test_help_says_every_default() -> None:
    text = " ".join(engine_parser().format_help().split())
    assert text.count("(default: ") >= len([name for group in ENGINE_OPTIONS.values() for name in group]) - 3
    for words in ("(default: 256)", "(default: 2048 on a CPU, 8192 on a GPU)", "(default: on)", "(default: 0.9)"):
        assert words in text


def test_options_that_were_given_can_be_told_apart() -> None:
    args = engine_parser().parse_args(["model", "--seed", "0", "--speculative-model", "x"])
    assert engine_options_given(args) == ["seed", "speculative_model"]


def group(flag: str, **settings: Any) -> OptionGroup:
    def add(parser: argparse._ArgumentGroup) -> None:
        parser.add_argument(flag, **settings)

    return OptionGroup("acme", add)


def test_options_of_plugins_reach_the_configuration_under_their_destinations() -> None:
    groups = [("acme-x", group("--acme-x-depth", type=int, default=3)), ("two", group("--two-on", action="store_true"))]
    assert parse("m", groups=groups).plugin_options == {"acme_x_depth": 3, "two_on": False}
    assert parse("m", "--acme-x-depth", "5", groups=groups).plugin_options["acme_x_depth"] == 5


def test_a_plugin_cannot_take_an_option_that_exists() -> None:
    with pytest.raises(PluginError, match=r"plugin 'acme' has an option that exists already.*no:acme"):
        engine_parser([("acme", group("--dtype", dest="acme_dtype"))])


def test_a_plugins_destinations_start_with_its_name() -> None:
    with pytest.raises(PluginError, match="destinations must start with 'acme_'"):
        engine_parser([("acme", group("--depth"))])
