"""When the next step is launched: early enough for the device, late enough for whoever arrives meanwhile.

A device works on one step while the next one waits for it. Launched at once, that next step would be decided a whole
step before it begins, and a request that arrives in between would have to wait for the one after it.
"""

from __future__ import annotations

from collections import deque

MARGIN = 0.0005
"""Seconds by which a step is launched earlier than the device needs it."""


class Pace:
    """Knows from the newest steps how long the device will be busy. All times are those of ``time.perf_counter``."""

    def __init__(self) -> None:
        self._decode_seconds: deque[float] = deque([0.0], maxlen=4)
        self._last_ready = 0.0
        self._host_is_late = False

    def finished(self, launched_at: float, ready: float, *, was_done: bool, has_prompts: bool) -> None:
        """A step's results were there at ``ready``; ``was_done``: before anybody waited for them."""
        if not has_prompts:
            self._decode_seconds.append(ready - max(launched_at, self._last_ready))
        self._last_ready = ready
        self._host_is_late = was_done

    def spare(self, started: float, launched_at: float, now: float) -> float:
        """Seconds until the next launch, when all that is under way is a step that was launched from ``started`` to
        ``launched_at``. Steps with prompts take longer than is assumed here: the launch after them is an early one."""
        if self._host_is_late:
            return 0.0
        end = max(launched_at, self._last_ready) + min(self._decode_seconds)
        return max(0.0, end - 2 * (launched_at - started) - MARGIN - now)
