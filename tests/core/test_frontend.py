"""The frontend: what it refuses, and how the engine's tokens become deltas. The engine is a script here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from octavo.errors import EngineDead, RequestError
from octavo.frontend import Collector, Frontend
from octavo.messages import EngineInfo, SequenceOutput, StepOutputs, StepStats, Submit, Timing, TokenLogprobs
from octavo.outputs import CompletionDelta
from octavo.request import FinishReason, SamplingParams
from octavo.text import TextProcessor, byte_level_alphabet

VOCAB_SIZE = 257
END = 256
TIMING = Timing(1.0, 2.0, 3.0, 4.0)


@functools.cache
def processor() -> TextProcessor:
    """Token ids are bytes, and 256 ends a sequence."""
    tokenizer = Tokenizer(models.BPE(byte_level_alphabet(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return TextProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"))


class ScriptedEngine:
    """Takes requests, and answers with whatever a test says."""

    def __init__(self) -> None:
        self.info = EngineInfo("m", "M", "float32", "cpu", VOCAB_SIZE, 64, 8, 16, 4, 64, "torch", 0)
        self.stats = StepStats()
        self.dead: EngineDead | None = None
        self.submitted: list[Submit] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.refusal: Exception | None = None

    def start(self, on_outputs: Callable[[StepOutputs], None], on_death: Callable[[EngineDead], None]) -> None:
        self.answer, self.die = on_outputs, on_death

    def submit(self, submit: Submit) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(submit)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))

    def close(self, drain: float = 0.0) -> None: ...

    def step(self, *outputs: SequenceOutput) -> None:
        self.answer(StepOutputs(list(outputs), StepStats(num_running=len(outputs))))


class Run:
    """A frontend on a scripted engine, and everything it said."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.summaries: list[Any] = []
        self.steps: list[StepStats] = []
        self.deltas: list[CompletionDelta] = []
        self.frontend = Frontend(self.engine, processor(), on_finished=self.summaries.append, on_step=self.steps.append)
        self.frontend.start()

    def submit(self, prompt: list[int] | None = None, **params: Any) -> str:
        request_id = self.frontend.submit(prompt or [1, 2], SamplingParams(**params), self.deltas.append)
        self.id = request_id
        return request_id

    def say(self, text: str | bytes | list[int], index: int = 0, **fields: Any) -> None:
        ids = list(text.encode() if isinstance(text, str) else text)
        if fields.get("finish_reason"):
            fields.setdefault("timing", TIMING)
        self.engine.step(SequenceOutput(self.id, index, ids, **fields))

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def ids(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]


@pytest.fixture
def run() -> Run:
    return Run()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message", "code"),
    [
        ([], {}, "prompt is empty", None),
        ([1, 300, -1], {}, "-1, 300", None),
        ([1], {"logit_bias": {5: 1.0, 999: 1.0, 998: 1.0}}, "logit_bias.*998, 999", None),
        ([1], {"allowed_token_ids": [1, 257]}, "allowed_token_ids.*257", None),
        ([1], {"stop_token_ids": [1000]}, "stop_token_ids.*1000", None),
        ([1] * 64, {"max_tokens": 1}, "64 tokens.*64", "context_length_exceeded"),
        ([1] * 60, {"max_tokens": 5}, "60 tokens and max_tokens asks for 5.*64.*at most 4", "context_length_exceeded"),
        ([1] * 60, {"max_tokens": None, "min_tokens": 5}, "min_tokens", None),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    run: Run, prompt: list[int], params: dict[str, Any], message: str, code: str | None
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        run.frontend.submit(prompt, SamplingParams(**params), run.deltas.append)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert run.engine.submitted == []
    assert run.frontend.num_open == 0


def test_max_tokens_none_means_the_rest_of_the_context(run: Run) -> None:
    run.submit([1] * 60, max_tokens=None)
    assert run.engine.submitted[0].params.max_tokens == 4


def test_what_the_engine_refuses_is_passed_on_and_forgotten(run: Run) -> None:
    run.engine.refusal = RequestError("no more today")
    with pytest.raises(RequestError, match="no more today"):
        run.submit()
    assert run.frontend.num_open == 0


def test_an_id_can_be_used_once_at_a_time(run: Run) -> None:
    run.frontend.submit([1], SamplingParams(), run.deltas.append, request_id="a")
    with pytest.raises(RequestError, match="'a' is running already"):
        run.frontend.submit([1], SamplingParams(), run.deltas.append, request_id="a")
    run.id = "a"
    run.say("x", finish_reason=FinishReason.LENGTH)
    run.frontend.submit([1], SamplingParams(), run.deltas.append, request_id="a")


def test_a_seed_is_drawn_unless_one_is_given(run: Run) -> None:
    run.submit(seed=-5)
    run.submit()
    run.submit()
    given_seed, one, other = (submit.seed for submit in run.engine.submitted)
    assert given_seed == -5
    assert one != other
    assert 0 <= one < 2**63


def test_bad_words_become_token_sequences(run: Run) -> None:
    run.submit(bad_words=["no"])
    assert run.engine.submitted[0].bad_token_ids == [list(b"no")]


# --- deltas ----------------------------------------------------------------------------------------------------------


def test_text_comes_as_it_is_made_and_ends_with_the_reason(run: Run) -> None:
    run.submit()
    run.say("he", num_cached_tokens=1)
    run.say("y", finish_reason=FinishReason.LENGTH, num_cached_tokens=1)
    assert [(d.text, d.token_ids, d.finish_reason) for d in run.deltas] == [
        ("he", list(b"he"), None),
        ("y", list(b"y"), FinishReason.LENGTH),
    ]
    assert run.deltas[-1].timing == TIMING
    (summary,) = run.summaries
    assert (summary.num_prompt_tokens, summary.num_output_tokens, summary.num_cached_tokens) == (2, 3, 1)
    assert run.frontend.num_open == 0


def test_a_sample_that_a_stop_string_ends_has_the_engines_times(run: Run) -> None:
    run.submit(stop="STOP")
    run.say("ST", timing=Timing(1.0, 2.0, 3.0, 0.0))
    run.say("OP")
    assert [delta.timing is None for delta in run.deltas[:-1]] == [True] * (len(run.deltas) - 1)
    (summary,) = run.summaries
    timing = run.deltas[-1].timing
    assert summary.timing == timing
    assert timing is not None
    assert (timing.arrival, timing.scheduled, timing.first_token) == (1.0, 2.0, 3.0)
    assert timing.finished > 3.0


def test_a_prompt_that_is_only_scored_shows_no_token(run: Run) -> None:
    run.submit([1, 2], max_tokens=0, prompt_logprobs=0, logprobs=1, stop="a")
    assert run.engine.submitted[0].params.max_tokens == 1
    found = [None, TokenLogprobs(2, -0.5, 1)]
    sampled = [TokenLogprobs(END, -0.1, 1, [END], [-0.1])]
    run.say([END], prompt_logprobs=found, logprobs=sampled, finish_reason=FinishReason.STOP, stop_token_id=END)
    (delta,) = run.deltas
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == ("", [], FinishReason.LENGTH, None)
    assert [one and one.token.logprob for one in delta.prompt_logprobs or ()] == [None, -0.5]
    assert run.summaries[0].num_output_tokens == 0


@pytest.mark.parametrize(("params", "shown"), [({}, "a"), ({"include_stop_str_in_output": True}, "a<|end|>")])
def test_the_token_that_ends_a_sample_is_not_text_unless_asked_for(
    run: Run, params: dict[str, Any], shown: str
) -> None:
    run.submit(skip_special_tokens=False, **params)
    run.say([97, END], finish_reason=FinishReason.STOP, stop_token_id=END)
    assert (run.text(), run.ids(), run.deltas[-1].stop_reason) == (shown, [97, END], END)


def test_a_stop_string_ends_the_sample_and_stops_the_engine(run: Run) -> None:
    run.submit(stop="STOP")
    run.say("one S")
    assert run.text() == "one "
    run.say("TOP two")
    assert run.text() == "one "
    assert run.deltas[-1].finish_reason is FinishReason.STOP
    assert run.deltas[-1].stop_reason == "STOP"
    assert run.engine.aborted == [(run.id, 0)]
    count = len(run.deltas)
    run.say(" three")
    run.say("", finish_reason=FinishReason.ABORT)
    assert len(run.deltas) == count, "what the engine made in the meantime is ignored"
    assert len(run.summaries) == 1


def test_text_that_was_held_back_is_shown_when_no_stop_string_comes(run: Run) -> None:
    run.submit(stop="STOP")
    run.say("one STO")
    run.say("RM")
    run.say("ST", finish_reason=FinishReason.LENGTH)
    assert [delta.text for delta in run.deltas] == ["one ", "STORM", "ST"]
    assert run.engine.aborted == []


def test_a_stop_string_does_not_count_before_min_tokens(run: Run) -> None:
    run.submit(stop="b", min_tokens=2)
    run.say("abab")
    assert (run.text(), run.deltas[-1].finish_reason) == ("aba", FinishReason.STOP)


def test_a_character_in_pieces_is_shown_whole(run: Run) -> None:
    run.submit()
    for byte in "ö".encode():
        run.say(bytes([byte]))
    run.say(b"\xe4", finish_reason=FinishReason.LENGTH)
    assert [delta.text for delta in run.deltas] == ["", "ö", "\ufffd"]


def logprobs_of(ids: bytes) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, -0.5, 1, [token, 0x62], [-0.5, -1.5]) for token in ids]


@settings(deadline=None)
@given(
    text=st.text("abö🎉", max_size=12).filter(bool),
    stops=st.lists(st.text("abö", min_size=1, max_size=3), max_size=2),
    include=st.booleans(),
    data=st.data(),
)
def test_logprob_texts_joined_are_the_text_however_it_is_cut(
    text: str, stops: list[str], include: bool, data: Any
) -> None:
    ids = text.encode()
    whole, parts = Run(), Run()
    for run in (whole, parts):
        run.submit(stop=stops, include_stop_str_in_output=include, logprobs=2)
    whole.say(ids, logprobs=logprobs_of(ids), finish_reason=FinishReason.LENGTH)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1)))) if len(ids) > 1 else []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        reason = FinishReason.LENGTH if end == len(ids) else None
        parts.say(ids[start:end], logprobs=logprobs_of(ids[start:end]), finish_reason=reason)
    for run in (whole, parts):
        for delta in run.deltas:
            assert "".join(position.token.text for position in delta.logprobs or ()) == delta.text
            assert [position.token.token_id for position in delta.logprobs or ()] == delta.token_ids
    assert parts.text() == whole.text()
    assert parts.ids() == whole.ids()
    assert parts.deltas[-1].stop_reason == whole.deltas[-1].stop_reason
    expected_end = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    assert (whole.deltas[-1].finish_reason is FinishReason.STOP) == (expected_end is not None)


def test_logprobs_carry_exact_bytes_ranks_and_alternatives(run: Run) -> None:
    run.submit(logprobs=2)
    run.say(b"\xc3", logprobs=logprobs_of(b"\xc3"))
    ((position,),) = [delta.logprobs or [] for delta in run.deltas]
    assert (position.token.text, position.token.data, position.token.rank) == ("", b"\xc3", 1)
    assert [(top.text, top.data, top.rank, top.logprob) for top in position.top] == [
        ("\ufffd", b"\xc3", 1, -0.5),
        ("b", b"b", 2, -1.5),
    ]


def test_prompt_logprobs_spell_the_prompt(run: Run) -> None:
    run.submit(list(b"abc"), prompt_logprobs=0)
    run.say("", prompt_logprobs=[None, TokenLogprobs(98, -1.0, 2), TokenLogprobs(99, -2.0, 3)])
    found = run.deltas[0].prompt_logprobs
    assert found is not None
    assert [position and (position.token.text, position.token.rank) for position in found] == [None, ("b", 2), ("c", 3)]


# --- several samples, ends -------------------------------------------------------------------------------------------


def test_a_request_ends_when_all_its_samples_have(run: Run) -> None:
    run.submit(n=2, stop="X")
    run.say("aX", index=1)
    assert run.engine.aborted == [(run.id, 1)]
    assert run.frontend.num_open == 1
    run.say("bc", index=0, finish_reason=FinishReason.LENGTH)
    assert (run.text(0), run.text(1)) == ("bc", "a")
    assert run.frontend.num_open == 0
    (summary,) = run.summaries
    assert summary.num_output_tokens == 4


def test_abort_reaches_the_engine_which_confirms(run: Run) -> None:
    run.submit()
    run.frontend.abort(run.id)
    run.frontend.abort("unknown")
    assert run.engine.aborted == [(run.id, None)]
    run.say("", finish_reason=FinishReason.ABORT)
    assert run.deltas[-1].finish_reason is FinishReason.ABORT
    assert run.summaries[0].finish_reason is FinishReason.ABORT
    assert run.frontend.num_open == 0


def test_the_engines_death_ends_every_open_sample_with_its_cause(run: Run) -> None:
    run.submit(n=2)
    run.say("x", index=0, finish_reason=FinishReason.LENGTH)
    run.engine.die(EngineDead("out of memory"))
    assert [(d.index, d.finish_reason, d.error) for d in run.deltas[1:]] == [(1, FinishReason.ERROR, "out of memory")]
    assert run.summaries[0].finish_reason is FinishReason.ERROR
    with pytest.raises(EngineDead, match="out of memory"):
        run.submit()


def test_an_error_of_one_sample_reaches_its_sink(run: Run) -> None:
    run.submit()
    run.say("", finish_reason=FinishReason.ERROR, error="needs 9 blocks of 8")
    assert run.deltas[-1].error == "needs 9 blocks of 8"


def test_deltas_of_one_step_are_delivered_together() -> None:
    engine, batches = ScriptedEngine(), []
    frontend = Frontend(engine, processor(), deliver=batches.append)
    frontend.start()
    sinks = [lambda delta: None, lambda delta: None]
    ids = [frontend.submit([1], SamplingParams(), sink) for sink in sinks]
    engine.step(*(SequenceOutput(request_id, 0, [97]) for request_id in ids))
    assert [[sink for sink, _delta in batch] for batch in batches] == [sinks]


def test_every_step_is_observed(run: Run) -> None:
    run.submit()
    run.say("a")
    assert [stats.num_running for stats in run.steps] == [1]


def test_collector_folds_deltas_into_an_output() -> None:
    collector = Collector([1, 2], 2, "prompt")
    collector.push(CompletionDelta(1, "b", [98]))
    collector.push(CompletionDelta(0, "a", [97], num_cached_tokens=1))
    collector.push(CompletionDelta(1, "c", [99], finish_reason=FinishReason.STOP, stop_reason="x", timing=TIMING))
    assert not collector.finished
    assert not collector.wait(0)
    collector.push(CompletionDelta(0, "", [], finish_reason=FinishReason.LENGTH))
    assert collector.wait(0)
    output = collector.result("id")
    assert [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs] == [
        ("a", [97], FinishReason.LENGTH, None),
        ("bc", [98, 99], FinishReason.STOP, "x"),
    ]
    assert (output.prompt, output.prompt_token_ids, output.num_cached_tokens) == ("prompt", [1, 2], 1)


def test_collector_raises_what_went_wrong() -> None:
    collector = Collector([1])
    collector.push(CompletionDelta(0, "", [], finish_reason=FinishReason.ERROR, error="boom"))
    with pytest.raises(EngineDead, match="boom"):
        collector.result()
