"""Which class builds a model, and what is said when none does."""

from __future__ import annotations

import pytest

from octavo.architectures import choose_model
from octavo.errors import CheckpointError, ConfigError, PluginError
from octavo.hooks import Provider


class Oak:
    """Stands for a model class."""


class Elm:
    """Another."""


PROVIDERS = {
    "OakForCausalLM": Provider("OakForCausalLM", Oak),
    "ElmForCausalLM": Provider("ElmForCausalLM", Elm),
    "AshForCausalLM": Provider("AshForCausalLM", Oak, requires=("module_that_nobody_has",)),
    "YewForCausalLM": Provider("YewForCausalLM", "octavo.errors:Yew"),
}


def test_the_class_of_the_named_architecture() -> None:
    assert choose_model({"architectures": ["ElmForCausalLM"]}, PROVIDERS) is Elm


def test_of_several_architectures_the_first_known_one() -> None:
    assert choose_model({"architectures": ["NewOakForCausalLM", "OakForCausalLM", "ElmForCausalLM"]}, PROVIDERS) is Oak


def test_an_unknown_architecture_lists_the_known_ones_and_says_how_to_add_it() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_model({"architectures": ["OkaForCausalLM"]}, PROVIDERS)
    message = str(caught.value)
    assert "'OkaForCausalLM'" in message
    assert "the nearest is OakForCausalLM" in message
    assert "known: AshForCausalLM, ElmForCausalLM, OakForCausalLM, YewForCausalLM" in message
    for part in ("octavo.plugins", "octavo_models", "docs/plugins/models.md"):
        assert part in message


def test_without_any_model_plugin_the_error_says_which_one_is_left_out() -> None:
    with pytest.raises(ConfigError, match="none \\(is the plugin 'models' left out\\?\\)"):
        choose_model({"architectures": ["OakForCausalLM"]}, {})


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}, {"architectures": "Oak"}])
def test_a_config_without_architectures_says_how_to_name_one(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="--hf-overrides"):
        choose_model(config, PROVIDERS)


def test_what_a_provider_lacks_is_said() -> None:
    with pytest.raises(ConfigError, match="'AshForCausalLM' cannot be used here: the module 'module_that_nobody_has'"):
        choose_model({"architectures": ["AshForCausalLM"]}, PROVIDERS)


def test_a_provider_that_names_no_class_is_the_plugins_fault() -> None:
    with pytest.raises(PluginError, match=r"'octavo\.errors:Yew', which cannot be imported"):
        choose_model({"architectures": ["YewForCausalLM"]}, PROVIDERS)
