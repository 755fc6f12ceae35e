"""Who is admitted next and who gives way: the interface, and the policies that come with the core. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from octavo.hooks import Provider
from octavo.request import Request


class SchedulingPolicy(Protocol):
    """The order in which waiting requests are admitted, and who gives way when memory runs out."""

    name: ClassVar[str]

    def key(self, request: Request) -> tuple[float, ...]:
        """Waiting requests are admitted in ascending order of this; ``request.sequence`` breaks ties."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Which running request (in order of admission, never empty) is preempted."""
        ...


class FirstComeFirstServed:
    """Requests are admitted in the order they arrived; the one admitted last gives way."""

    name: ClassVar[str] = "fcfs"

    def key(self, request: Request) -> tuple[float, ...]:
        return ()

    def victim(self, running: Sequence[Request]) -> Request:
        return running[-1]


class Priority:
    """Lower ``priority`` numbers first, then in order of arrival; the least urgent gives way."""

    name: ClassVar[str] = "priority"

    def key(self, request: Request) -> tuple[float, ...]:
        return (request.priority,)

    def victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=lambda request: (request.priority, request.sequence))


BUILTIN = (Provider("fcfs", FirstComeFirstServed), Provider("priority", Priority))
