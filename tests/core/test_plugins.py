"""The plugin host: what is found, what is selected, what is refused and how it is said."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import default_model
from octavo.config import EngineConfig
from octavo.errors import ConfigError, PluginError
from octavo.hooks import API_VERSION, Provider
from octavo.plugins import DEFAULT_PLUGINS, PluginHost, PluginRecord, Selection, discover, select

HEAD = """
from octavo import KernelProvider, PluginInfo, Provider, hookimpl
plugin = PluginInfo(api=(1, 1), summary="a plugin for a test")
"""
POLICY = (
    HEAD
    + """
@hookimpl
def octavo_scheduling_policies():
    return [Provider("shortest", "acme_one:Shortest")]
"""
)


class Site:
    """A folder on ``sys.path`` in which distributions are installed as pip leaves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, source: str, *, distribution: str | None = None, version: str = "1.0") -> PluginRecord:
        """A distribution whose only plugin is called ``name`` and is a module with that source."""
        distribution = distribution or f"acme-{name}"
        module = distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[octavo.plugins]\n{name} = {module}\n[console_scripts]\nx = y:z\n")
        importlib.invalidate_caches()
        return PluginRecord(name, distribution, version, module)

    def host(self, *sources: str, prefer: dict[str, str] | None = None) -> PluginHost:
        """A host of plugins ``one``, ``two``, … with those sources."""
        names = ("one", "two", "three")[: len(sources)]
        return PluginHost([self.install(n, s) for n, s in zip(names, sources, strict=True)], prefer=prefer)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        monkeypatch.delitem(sys.modules, name)
    return Site(tmp_path)


def record(name: str, distribution: str = "octavo") -> PluginRecord:
    return PluginRecord(name, distribution, "1.0", f"{name}.plugin")


def installed(*names: str) -> dict[str, list[PluginRecord]]:
    return {name: [record(name)] for name in names}


def names_of(manifest: Sequence[PluginRecord]) -> list[str]:
    return [one.name for one in manifest]


# --- discovery -------------------------------------------------------------------------------------------------------


def test_discovery_reads_metadata_and_imports_nothing(site: Site) -> None:
    expected = site.install("bomb", "raise SystemExit('imported')", version="2.5")
    assert discover()["bomb"] == [expected]
    assert "acme_bomb" not in sys.modules


def test_our_own_plugins_come_through_the_same_door() -> None:
    found = discover()
    for name in DEFAULT_PLUGINS:
        assert [one.distribution for one in found[name]] == ["octavo"]


def test_a_name_claimed_by_two_distributions_has_two_records(site: Site) -> None:
    first = site.install("order", HEAD, distribution="acme-order")
    second = site.install("order", HEAD, distribution="zeta-order")
    assert discover()["order"] == [first, second]


def test_a_folder_that_is_twice_on_the_path_shows_a_plugin_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = site.install("one", HEAD)
    monkeypatch.syspath_prepend(str(site.folder))
    assert discover()["one"] == [expected]


# --- what --plugins says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        (None, Selection()),
        ("", Selection(listed=())),
        ("awq", Selection(listed=("awq",))),
        (" awq , gguf,", Selection(listed=("awq", "gguf"))),
        ("awq,no:triton", Selection(listed=("awq",), excluded=("triton",))),
        ("no:triton", Selection(excluded=("triton",))),  # the rest is still automatic
    ],
)
def test_the_option(text: str | None, selection: Selection) -> None:
    assert Selection.parse(text) == selection


@pytest.mark.parametrize(("text", "said"), [("no:", "must be followed by"), ("awq,no:awq", "both selected and left")])
def test_an_option_that_makes_no_sense(text: str, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        Selection.parse(text)


def test_the_defaults_are_selected_in_their_order() -> None:
    assert names_of(select(Selection(), {}, installed=installed(*reversed(DEFAULT_PLUGINS), "awq"))) == list(
        DEFAULT_PLUGINS
    )


def test_a_default_that_is_not_installed_is_not_there() -> None:
    assert names_of(select(Selection(), {}, installed=installed("models"))) == ["models"]


def test_a_list_is_exact_beside_the_defaults() -> None:
    selection = Selection.parse("awq,no:triton")
    manifest = select(selection, {}, installed=installed("models", "triton", "awq", "gptq"))
    assert names_of(manifest) == ["models", "awq"]


def test_what_is_needed_is_activated_and_logged_when_nothing_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        manifest = select(
            Selection.parse("no:triton"),
            {"awq": "the checkpoint's quant_method is awq"},
            installed=installed("models", "triton", "awq"),
        )
    assert names_of(manifest) == ["models", "awq"]
    assert "activating plugin 'awq': the checkpoint's quant_method is awq" in caplog.text


def test_what_is_needed_but_not_listed_is_refused_with_the_option_that_works() -> None:
    needed = {"awq": "the checkpoint's quant_method is awq"}
    have = installed("models", "triton", "speculative", "awq")
    with pytest.raises(PluginError, match="quant_method is awq") as refused:
        select(Selection.parse("speculative,no:triton"), needed, installed=have)
    option = str(refused.value).rpartition("--plugins ")[2]
    assert names_of(select(Selection.parse(option), needed, installed=have)) == ["models", "speculative", "awq"]


def test_listing_a_plugin_leaves_the_default_model_servable() -> None:
    suffix = Path(default_model.FILE_NAME).suffix.removeprefix(".")
    have = installed(*DEFAULT_PLUGINS, "speculative")
    assert suffix in names_of(select(Selection.parse("speculative"), {suffix: "the file's ending"}, installed=have))


def test_what_is_needed_but_left_out_is_refused() -> None:
    with pytest.raises(PluginError, match=r"'models' is needed \(a reason\) but left out; remove no:models"):
        select(Selection.parse("no:models"), {"models": "a reason"}, installed=installed("models"))


@pytest.mark.parametrize("option", ["qwa", "no:qwa"])
def test_an_unknown_name_is_refused_with_the_installed_ones(option: str) -> None:
    with pytest.raises(PluginError, match=r"qwa.*installed: awq, models"):
        select(Selection.parse(option), {}, installed=installed("awq", "models"))


def test_something_needed_that_is_not_installed_says_why_it_is_needed() -> None:
    with pytest.raises(PluginError, match=r"plugin 'awq' \(the checkpoint says so\) is not installed"):
        select(Selection(), {"awq": "the checkpoint says so"}, installed=installed("models"))


def test_two_claimants_are_an_error_that_prefer_resolves() -> None:
    have = {"models": [record("models", "octavo"), record("models", "zeta")]}
    with pytest.raises(PluginError, match=r"octavo 1\.0, zeta 1\.0; choose with --prefer models=octavo"):
        select(Selection(), {}, installed=have)
    (chosen,) = select(Selection(), {}, installed=have, prefer={"models": "zeta"})
    assert chosen.distribution == "zeta"
    with pytest.raises(PluginError, match=r"--prefer models=nobody.*octavo 1\.0, zeta 1\.0"):
        select(Selection(), {}, installed=have, prefer={"models": "nobody"})


NAMES = st.sampled_from([*DEFAULT_PLUGINS, "awq", "speculative"])


@given(listed=st.none() | st.sets(NAMES), excluded=st.sets(NAMES), needed=st.sets(NAMES), have=st.sets(NAMES))
def test_a_selection_holds_all_that_was_asked_for_or_is_refused(
    listed: set[str] | None, excluded: set[str], needed: set[str], have: set[str]
) -> None:
    selection = Selection(None if listed is None else tuple(sorted(listed)), tuple(sorted(excluded)))
    try:
        manifest = select(selection, dict.fromkeys(needed, "a reason"), installed=installed(*have))
    except PluginError:
        possible = (
            needed | (listed or set()) | excluded <= have
            and not needed & excluded
            and (listed is None or needed <= listed | set(DEFAULT_PLUGINS))
        )
        assert not possible
        return
    names = set(names_of(manifest))
    assert len(names) == len(manifest)
    assert (listed or set()) | needed <= names
    assert names <= (listed or set()) | needed | set(DEFAULT_PLUGINS)
    assert not names & excluded - (listed or set())


# --- what a plugin must be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import not_there_at_all", "cannot be imported: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("x = 1", "module acme_one has no 'plugin = PluginInfo"),
        ("plugin = 'one'", "module acme_one has no 'plugin = PluginInfo"),
        (HEAD.replace("(1, 1)", "(2, 3)"), f"supports plugin API 2 to 3, but this Octavo has API {API_VERSION}"),
        (HEAD.replace("(1, 1)", "(0, 0)"), f"supports plugin API 0 to 0, but this Octavo has API {API_VERSION}"),
        (HEAD + "@hookimpl\ndef octavo_modles(): return []", "unknown hook octavo_modles; did you mean octavo_models?"),
        (HEAD + "@hookimpl\ndef octavo_coffee(): return []", "unknown hook octavo_coffee; known: octavo_attention"),
        (HEAD + "def octavo_models(): return []", "defines octavo_models without @hookimpl"),
        (HEAD + "@hookimpl(wrapper=True)\ndef octavo_models(): return (yield)", "wraps octavo_models"),
        (HEAD + "@hookimpl\ndef octavo_models(registry): return []", "does not fit its hook"),
    ],
)
def test_a_plugin_that_is_not_one_is_named_with_the_way_to_leave_it_out(site: Site, source: str, said: str) -> None:
    with pytest.raises(PluginError) as refused:
        site.host(source)
    message = str(refused.value)
    assert message.startswith("plugin 'one' of acme-one 1.0 ")
    assert said in message
    assert message.endswith("To go on without it: --plugins no:one")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return None", "returns a NoneType from octavo_models, which must be a sequence"),
        ("return 'Acme'", "returns a str from octavo_models, which must be a sequence"),
        ("return Provider('Acme', object)", "returns a Provider from octavo_models, which must be a sequence"),
        ("yield Provider('Acme', object)", "returns a generator from octavo_models, which must be a sequence"),
        ("return ['Acme']", "must return Provider records from octavo_models, not str"),
        ("return [Provider('A', object), Provider('A', int)]", "provides 'A' twice in octavo_models"),
        ("raise OSError('no disk')", "failed in octavo_models: OSError: no disk"),
    ],
)
def test_a_provider_hook_that_returns_something_else_is_named(site: Site, body: str, said: str) -> None:
    host = site.host(HEAD + f"@hookimpl\ndef octavo_models(): {body}")
    with pytest.raises(PluginError, match=r"^plugin 'one' of acme-one 1\.0 ") as refused:
        host.models()
    assert said in str(refused.value)


def test_kernels_must_be_kernel_providers(site: Site) -> None:
    host = site.host(HEAD + "@hookimpl\ndef octavo_kernels(): return [Provider('quick', object)]")
    with pytest.raises(PluginError, match="must return KernelProvider records from octavo_kernels, not Provider"):
        host.kernels()


def test_kernels_are_told_apart_by_operation(site: Site) -> None:
    kernels = "[KernelProvider('quick', object, operation=o) for o in ('linear', 'rms_norm')]"
    host = site.host(HEAD + f"@hookimpl\ndef octavo_kernels(): return {kernels}")
    assert list(host.kernels()) == ["linear/quick", "rms_norm/quick"]


def test_what_plugins_provide_is_frozen_and_asked_for_once(site: Site) -> None:
    host = site.host(
        HEAD + "calls = []\n@hookimpl\ndef octavo_models():\n    calls.append(1)\n    return [Provider('A', object)]"
    )
    models = host.models()
    with pytest.raises(TypeError):
        models["B"] = Provider("B", object)  # type: ignore[index]
    assert host.models() is models
    assert sys.modules["acme_one"].calls == [1]


def test_a_class_is_imported_only_when_it_is_chosen(site: Site) -> None:
    (site.folder / "acme_model.py").write_text("class Acme: pass")
    host = site.host(HEAD + "@hookimpl\ndef octavo_models(): return [Provider('Acme', 'acme_model:Acme')]")
    provider = host.models()["Acme"]
    assert "acme_model" not in sys.modules
    assert provider.resolve().__name__ == "Acme"


# --- several plugins -------------------------------------------------------------------------------------------------


def test_two_plugins_that_provide_one_name_are_both_named_and_prefer_resolves_it(site: Site) -> None:
    other = POLICY.replace("acme_one:Shortest", "acme_two:Shortest")
    host = site.host(POLICY, other)
    with pytest.raises(PluginError) as refused:
        host.scheduling_policies()
    assert str(refused.value) == (
        "'shortest' (octavo_scheduling_policies) is provided by plugin 'one' of acme-one and by plugin 'two' of "
        "acme-two; choose with --prefer shortest=acme-one"
    )
    for number in ("one", "two"):
        chosen = PluginHost(host.manifest, prefer={"shortest": f"acme-{number}"}).scheduling_policies()["shortest"]
        assert chosen.target == f"acme_{number}:Shortest"


def test_the_last_of_three_claimants_can_be_preferred(site: Site) -> None:
    sources = [POLICY.replace("acme_one:", f"acme_{number}:") for number in ("one", "two", "three")]
    host = site.host(*sources, prefer={"shortest": "acme-three"})
    assert host.scheduling_policies()["shortest"].target == "acme_three:Shortest"


def test_plugins_that_share_an_implementation_may_all_name_it(site: Site) -> None:
    assert list(site.host(POLICY, POLICY).scheduling_policies()) == ["shortest"]


def test_two_plugins_with_one_command_are_refused(site: Site) -> None:
    command = HEAD + "@hookimpl\ndef octavo_commands(): return {'brew': lambda parser: None}"
    with pytest.raises(PluginError, match=r"'brew' \(octavo_commands\) is provided by plugin 'one' .* 'two'"):
        site.host(command, command).mappings("octavo_commands")


def test_plugins_that_do_not_work_together_are_refused(site: Site) -> None:
    alone = HEAD.replace('test")', 'test", incompatible=("two",))')
    with pytest.raises(
        PluginError, match=r"'one' does not work with plugin 'two'; leave one out with --plugins no:one"
    ):
        site.host(alone, HEAD)


def test_a_capability_that_a_plugin_does_not_work_with_is_refused_when_it_is_used(site: Site) -> None:
    host = site.host(HEAD.replace('test")', 'test", incompatible=("speculation",))'), HEAD)
    host.check_capabilities(["prefix-caching"])
    with pytest.raises(
        PluginError, match=r"'one' does not work with speculation; switch that off or use --plugins no:"
    ):
        host.check_capabilities(["prefix-caching", "speculation"])
    assert host.matrix()["one"]["speculation"] is False
    assert host.matrix()["one"]["overlap"] is True
    assert all(host.matrix()["two"].values())


def test_what_one_plugin_provides_is_listed_by_hook(site: Site) -> None:
    host = site.host(POLICY + "@hookimpl\ndef octavo_commands(): return {'brew': print}\n", HEAD)
    assert host.provided_by("one") == {"octavo_commands": ["brew"], "octavo_scheduling_policies": ["shortest"]}
    assert host.provided_by("two") == {}


# --- hooks that are told something -----------------------------------------------------------------------------------


def test_a_plugin_can_refuse_the_configuration_in_its_own_words(site: Site) -> None:
    host = site.host(
        HEAD
        + """
from octavo import ConfigError
@hookimpl
def octavo_check_config(config):
    if config.block_size < 32:
        raise ConfigError(f"one needs --block-size 32 or more, not {config.block_size}")
"""
    )
    host.check_config(EngineConfig(model="m", block_size=32))
    with pytest.raises(ConfigError, match=r"^one needs --block-size 32 or more, not 16$"):
        host.check_config(EngineConfig(model="m"))


def test_a_plugin_that_fails_while_it_checks_is_named(site: Site) -> None:
    host = site.host(HEAD + "@hookimpl\ndef octavo_check_config(config): config.no_such_field")
    with pytest.raises(PluginError, match=r"plugin 'one' of acme-one 1\.0 failed in octavo_check_config: AttributeErr"):
        host.check_config(EngineConfig(model="m"))


OBSERVER = HEAD + "seen = []\n@hookimpl\ndef octavo_request_finished(summary): seen.append(summary)"


def test_nobody_listens(site: Site) -> None:
    assert site.host(OBSERVER).observers("octavo_step_finished") is None


def test_an_observer_that_fails_is_reported_once_and_switched_off(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    failing = OBSERVER.replace("seen.append(summary)", "seen.append(summary); raise ValueError('full')")
    tell = site.host(failing, OBSERVER).observers("octavo_request_finished")
    assert tell is not None
    tell("first")
    tell("second")
    assert sys.modules["acme_one"].seen == ["first"]
    assert sys.modules["acme_two"].seen == ["first", "second"]
    assert caplog.text.count("plugin 'one' failed in octavo_request_finished and is switched off") == 1
    assert "ValueError: full" in caplog.text


def test_an_implementation_may_take_fewer_arguments_than_its_hook_offers(site: Site) -> None:
    tell = site.host(OBSERVER.replace("(summary): seen.append(summary)", "(): seen.append(1)")).observers(
        "octavo_request_finished"
    )
    assert tell is not None
    tell("first")
    assert sys.modules["acme_one"].seen == [1]


def test_time_spent_in_hooks_is_counted_by_plugin(site: Site) -> None:
    host = site.host(OBSERVER + "\nimport time\n@hookimpl\ndef octavo_models():\n    time.sleep(0.01)\n    return []")
    tell = host.observers("octavo_request_finished")
    assert tell is not None
    tell("first")
    host.models()
    assert host.seconds["one", "octavo_request_finished"] > 0
    assert host.seconds["one", "octavo_models"] >= 0.01


# --- the engine's process --------------------------------------------------------------------------------------------


def reproduce_elsewhere(site: Site, manifest: Sequence[PluginRecord]) -> subprocess.CompletedProcess[str]:
    program = (
        "import json, sys, msgspec\n"
        "from octavo.plugins import Manifest, PluginHost\n"
        "manifest = msgspec.json.decode(sys.argv[1], type=Manifest)\n"
        "print(list(PluginHost.reproduce(manifest).scheduling_policies()))\n"
    )
    rows = json.dumps(
        [{"name": r.name, "distribution": r.distribution, "version": r.version, "module": r.module} for r in manifest]
    )
    return subprocess.run(
        [sys.executable, "-c", program, rows],
        env={"PYTHONPATH": str(site.folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_process_reproduces_the_manifest(site: Site) -> None:
    result = reproduce_elsewhere(site, [site.install("one", POLICY)])
    assert result.stdout == "['shortest']\n", result.stderr


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda r: PluginRecord(r.name, r.distribution, "0.9", r.module), "found acme-one 1.0 (acme_one)"),
        (lambda r: PluginRecord(r.name, "zeta", r.version, r.module), "found acme-one 1.0 (acme_one)"),
        (lambda r: PluginRecord("two", r.distribution, r.version, r.module), "found nothing"),
    ],
)
def test_a_process_that_finds_something_else_fails_with_the_difference(
    site: Site, change: Callable[[PluginRecord], PluginRecord], found: str
) -> None:
    expected = change(site.install("one", POLICY))
    result = reproduce_elsewhere(site, [expected])
    assert result.returncode == 1
    assert f"cannot reproduce plugin '{expected.name}': expected {expected.distribution} {expected.version}" in (
        result.stderr
    )
    assert found in result.stderr
