"""The plugin ``speculative``: drafts by a small model, by heads on the target or from the sequence's own text."""

from __future__ import annotations

from typing import Any

from octavo import ConfigError, EngineConfig, KernelProvider, OptionGroup, PluginInfo, Provider, hookimpl
from octavo_speculative.settings import NgramSettings

plugin = PluginInfo(
    api=(1, 1), summary="Speculative decoding: a draft model, EAGLE heads, or n-grams of the text so far"
)


@hookimpl
def octavo_drafters() -> list[Provider]:
    return [
        Provider("draft-model", "octavo_speculative.draft_model:DraftModel"),
        Provider("eagle", "octavo_speculative.eagle:Eagle"),
        Provider("ngram", "octavo_speculative.ngram:Ngram"),
    ]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    return [KernelProvider("torch-ngram", "octavo_speculative.ngram:TorchNgram", priority=-100, operation="ngram")]


@hookimpl
def octavo_options() -> list[OptionGroup]:
    return [OptionGroup("speculation by n-grams", _add_options)]


@hookimpl
def octavo_check_config(config: EngineConfig) -> None:
    speculative = config.speculative
    NgramSettings.of(config)
    if speculative.drafter in ("draft-model", "eagle") and speculative.model is None:
        raise ConfigError(f"speculation by {speculative.drafter} needs a model; name one with --speculative-model")
    if speculative.drafter == "ngram":
        given = {
            "--speculative-model": speculative.model,
            "--speculative-quantization": speculative.quantization,
            "--speculative-dtype": None if speculative.dtype == "auto" else speculative.dtype,
        }
        for option, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{option} {value} says how a draft model is loaded, but ngram has none; leave it out or use "
                    f"--speculative-method draft-model"
                )


def _add_options(group: Any) -> None:
    defaults = NgramSettings()
    group.add_argument(
        "--speculative-ngram-min",
        type=int,
        default=defaults.shortest,
        metavar="N",
        help="tokens at the end of a sequence that must have occurred before, at least (default: %(default)s)",
    )
    group.add_argument(
        "--speculative-ngram-max",
        type=int,
        default=defaults.longest,
        metavar="N",
        help="the longest end that is looked for (default: %(default)s)",
    )
