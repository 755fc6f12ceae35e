"""An engine that does what a test says, for what a real one does too fast, too slowly or too rarely."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tests.conftest import VOCAB_SIZE, byte_tokenizer

from octavo.errors import EngineDead
from octavo.messages import EngineInfo, SequenceOutput, StepOutputs, StepStats, Submit, Timing, TokenLogprobs
from octavo.request import FinishReason
from octavo.text import TextProcessor

CONTEXT = 4096


def make_processor() -> TextProcessor:
    """Token ids are bytes (in the order of their letters); four special tokens follow."""
    return TextProcessor(byte_tokenizer(), VOCAB_SIZE, eos_token_ids=[])


class ScriptedEngine:
    """Answers every request with ``script``, over and over, a token a step, as fast as the test lets it.

    ``pause`` is the time between steps; while ``held`` is set nothing is computed. At most ``max_num_seqs`` sequences
    run, the others wait. ``refuses`` is what every request is refused with; after ``refuses_after`` requests the rest
    are.
    """

    def __init__(self, script: str = "abcdefghij", *, pause: float = 0.0, max_num_seqs: int = 2048) -> None:
        self.info = EngineInfo("m", "M", "float32", "cpu", VOCAB_SIZE, CONTEXT, 64, 16, max_num_seqs, 64, "torch", 0)
        self.stats = StepStats()
        self.dead: EngineDead | None = None
        self.pause = pause
        self.held = threading.Event()
        self.submitted: list[Submit] = []
        self.refuses: str | None = None
        self.refuses_after: int | None = None
        self._script = [make_processor().encode(character)[0] for character in script]
        self._changed = threading.Condition()
        self._sequences: dict[tuple[str, int], list[int]] = {}  # how many tokens are out, of how many
        self._submits: dict[str, Submit] = {}
        self._ended: list[SequenceOutput] = []
        self._closed = False

    def start(self, on_outputs: Callable[[StepOutputs], None], on_death: Callable[[EngineDead], None]) -> None:
        self._on_outputs, self._on_death = on_outputs, on_death
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, submit: Submit) -> None:
        if self.dead is not None:
            raise self.dead
        with self._changed:
            self.submitted.append(submit)
            self._submits[submit.request_id] = submit
            full = self.refuses_after is not None and len(self.submitted) > self.refuses_after
            for index in range(submit.params.n):
                if self.refuses is not None or full:
                    error = self.refuses or "it is one too many"
                    key = submit.request_id, index
                    self._ended.append(SequenceOutput(*key, [], finish_reason=FinishReason.ERROR, error=error))
                    continue
                self._sequences[submit.request_id, index] = [0, submit.params.max_tokens or 1]
            self._changed.notify()

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self._changed:
            for key in [key for key in self._sequences if key[0] == request_id and index in (None, key[1])]:
                del self._sequences[key]
                timing = Timing(0.0, 0.0, 0.0, time.monotonic())
                self._ended.append(SequenceOutput(*key, [], finish_reason=FinishReason.ABORT, timing=timing))
            self._changed.notify()

    def close(self, drain: float = 0.0) -> None:
        self.die("the engine was shut down")

    def die(self, cause: str) -> None:
        """Stop like an engine that failed."""
        with self._changed:
            if self.dead is None:
                self.dead = EngineDead(cause)
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait."""
        return len(self._sequences)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, timeout=0.05)
                if self._closed:
                    break
                outputs = self._step() if self._has_work() else None
            if outputs is not None:
                self.stats = outputs.stats
                self._on_outputs(outputs)
                time.sleep(self.pause)
        assert self.dead is not None
        self._on_death(self.dead)

    def _has_work(self) -> bool:
        return self._closed or bool(self._ended) or (bool(self._sequences) and not self.held.is_set())

    def _step(self) -> StepOutputs:
        outputs, self._ended = self._ended, []
        running = [] if self.held.is_set() else list(self._sequences)[: self.info.max_num_seqs]
        for key in running:
            state = self._sequences[key]
            token = self._script[state[0] % len(self._script)]
            state[0] += 1
            output = SequenceOutput(*key, [token])
            if self._submits[key[0]].params.logprobs is not None:
                output.logprobs = [TokenLogprobs(token, -0.5, 1, [token], [-0.5])]
            if state[0] == state[1]:
                del self._sequences[key]
                output.finish_reason = FinishReason.LENGTH
                now = time.monotonic()
                output.timing = Timing(self._submits[key[0]].arrival, now, now, now)
            outputs.append(output)
        num_running = min(len(self._sequences), self.info.max_num_seqs)
        stats = StepStats(
            num_running=num_running,
            num_waiting=len(self._sequences) - num_running,
            num_output_tokens=len(running),
            num_blocks=64,
            num_free_blocks=64 - min(64, num_running),
        )
        return StepOutputs(outputs, stats)
