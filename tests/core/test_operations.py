"""One of several implementations is chosen, and when none will do each says why."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from octavo.errors import ConfigError
from octavo.hooks import KernelProvider, Provider
from octavo.operations import Operations, choose


@dataclass(frozen=True)
class Need:
    size: int


class Anything:
    @classmethod
    def missing(cls, need: Need) -> list[str]:
        return []


class Sixteens(Anything):
    @classmethod
    def missing(cls, need: Need) -> list[str]:
        reasons = [] if need.size % 16 == 0 else [f"size {need.size} is not a multiple of 16"]
        return reasons if need.size < 1000 else [*reasons, "size is 1000 or more"]


PLAIN = Provider("plain", Anything, priority=-100)
QUICK = Provider("quick", Sixteens, priority=10)
ABSENT = Provider("absent", "not_there:Class", priority=20, requires=("not_there",))


def test_the_highest_priority_that_lacks_nothing_wins() -> None:
    assert choose("product", [PLAIN, QUICK, ABSENT], Need(32)) == ("quick", Sixteens)
    assert choose("product", [PLAIN, QUICK, ABSENT], Need(33)) == ("plain", Anything)


def test_of_equal_priorities_the_first_wins() -> None:
    assert choose("product", [Provider("one", Anything), Provider("two", Anything)], Need(1))[0] == "one"


def test_one_can_be_insisted_on() -> None:
    assert choose("product", [PLAIN, QUICK], Need(32), "plain")[0] == "plain"
    with pytest.raises(
        ConfigError, match=r"product 'slow' is not provided by any selected plugin; there are: quick, pl"
    ):
        choose("product", [PLAIN, QUICK], Need(32), "slow")
    with pytest.raises(ConfigError, match="size 33 is not a multiple of 16"):
        choose("product", [PLAIN, QUICK], Need(33), "quick")


def test_when_none_can_serve_every_candidate_gives_all_its_reasons() -> None:
    with pytest.raises(ConfigError) as refused:
        choose("product", [QUICK, ABSENT], Need(1001))
    assert str(refused.value).splitlines() == [
        "no product can serve Need(size=1001):",
        "  absent: the module 'not_there' is not installed",
        "  quick: size 1001 is not a multiple of 16; size is 1000 or more",
    ]


def test_when_nothing_is_provided_it_says_so() -> None:
    with pytest.raises(ConfigError, match="none is provided"):
        choose("product", [], Need(1))


# --- operations ------------------------------------------------------------------------------------------------------

PLUGINS = {
    "linear/quick": KernelProvider("quick", Sixteens, priority=10, operation="linear"),
    "norm/quick": KernelProvider("quick", Anything, priority=10, operation="norm"),
}
BUILTIN = [KernelProvider("plain", Anything, priority=-100, operation="linear")]


def test_an_operation_is_chosen_by_need_and_the_log_names_all_that_are_in_use() -> None:
    operations = Operations(BUILTIN, PLUGINS)
    assert operations.choose("linear", Need(32)) is Sixteens
    assert operations.choose("linear", Need(33)) is Anything
    assert operations.choose("norm", Need(33)) is Anything
    assert operations.log == {"linear": {"quick", "plain"}, "norm": {"quick"}}
    assert list(operations.passed_over["linear"]) == ["quick: size 33 is not a multiple of 16"]


def test_a_need_is_decided_once() -> None:
    asked = []

    class Counted(Anything):
        @classmethod
        def missing(cls, need: Need) -> list[str]:
            asked.append(need)
            return []

    operations = Operations([KernelProvider("counted", Counted, operation="linear")], {})
    assert operations.choose("linear", Need(1)) is operations.choose("linear", Need(1))
    assert asked == [Need(1)]


def test_an_implementation_is_insisted_on_by_operation() -> None:
    operations = Operations(BUILTIN, PLUGINS, {"linear": "plain"})
    assert operations.choose("linear", Need(32)) is Anything
    with pytest.raises(ConfigError, match="no operation is called 'liner'; there are: linear, norm"):
        Operations(BUILTIN, PLUGINS, {"liner": "plain"})


def test_an_operation_that_nobody_implements() -> None:
    with pytest.raises(ConfigError, match="no kernel for 'brew' can serve"):
        Operations(BUILTIN, PLUGINS).choose("brew", Need(1))
