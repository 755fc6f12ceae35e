"""The records that plugins return, and the manual that the hook specifications are."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from octavo.errors import PluginError
from octavo.hooks import API_VERSION, CAPABILITIES, Hooks, KernelProvider, PluginInfo, Provider, hookimpl

HOOKS = {name: function for name, function in vars(Hooks).items() if name.startswith("octavo_")}


def test_a_provider_names_a_class_or_is_given_one() -> None:
    assert Provider("a", Provider).resolve() is Provider
    assert Provider("a", "octavo.hooks:Provider").resolve() is Provider


@pytest.mark.parametrize("target", ["not_there:Class", "octavo.hooks:NotThere", "octavo.hooks", "not_there.deeper:X"])
def test_a_provider_that_names_nothing_says_what_it_named(target: str) -> None:
    with pytest.raises(PluginError, match=f"provider 'a' names '{target}', which cannot be imported: "):
        Provider("a", target).resolve()


def test_a_provider_says_which_modules_it_lacks() -> None:
    provider = Provider("a", "x:Y", requires=("octavo", "not_there", "not_there.deeper"))
    assert provider.lacking() == [
        "the module 'not_there' is not installed",
        "the module 'not_there.deeper' is not installed",
    ]
    assert Provider("a", "x:Y", requires=("octavo.hooks",)).lacking() == []


@pytest.mark.parametrize(
    "made", [Provider("a", "x:Y"), PluginInfo((1, 1), ""), KernelProvider("a", "x:Y", operation="o")]
)
def test_records_are_frozen(made: object) -> None:
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_when_it_is_called_and_in_which_process(name: str) -> None:
    words = " ".join((inspect.getdoc(HOOKS[name]) or "").split())
    assert words, "no docstring"
    assert any(when in words for when in ("start", "Start", "Called", "Once")), words
    assert "process" in words, words


def test_every_hook_is_a_specification_and_implementations_are_marked() -> None:
    assert all(hasattr(function, "octavo_spec") for function in HOOKS.values())

    @hookimpl
    def octavo_models() -> list[Provider]:
        return []

    assert hasattr(octavo_models, "octavo_impl")


def test_version_and_capabilities() -> None:
    assert API_VERSION == 1
    assert len(set(CAPABILITIES)) == len(CAPABILITIES)
