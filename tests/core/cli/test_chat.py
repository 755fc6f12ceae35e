"""A conversation in the terminal: what is sent, what is kept, how it is stopped."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tests.core.bench.conftest import FakeServer

from octavo import FinishReason
from octavo.cli import main
from octavo.cli.chat import EngineSpeaker, Message, ServerSpeaker, converse
from octavo.errors import ConfigError, RequestError
from octavo.outputs import CompletionDelta


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


class Echo:
    """Answers with the number of messages, in two pieces; remembers what it was asked."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.closed = 0
        self.problem: BaseException | None = None

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        self.asked.append(list(messages))
        try:
            yield "got "
            if self.problem is not None:
                raise self.problem
            yield str(len(messages))
        finally:
            self.closed += 1


def lines(*typed: str | BaseException) -> Callable[[str], str]:
    """What a user types, one line a call; then Ctrl-D."""
    left = list(typed)

    def read(prompt: str) -> str:
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_the_conversation_grows_and_reset_forgets_it() -> None:
    speaker = Echo()
    system = [{"role": "system", "content": "be brief"}]
    converse(speaker, system, lines("one", "two", "", "/reset", "three"))
    assert speaker.asked[1] == [
        *system,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "got 2"},
        {"role": "user", "content": "two"},
    ]
    assert speaker.asked[2] == [*system, {"role": "user", "content": "three"}]
    assert len(speaker.asked) == 3


def test_answers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    converse(Echo(), [], lines("one"))
    assert "got 1\n" in capsys.readouterr().out


def test_exit_leaves_and_an_unknown_command_is_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Echo()
    converse(speaker, [], lines("/quit", "/exit", "never read"))
    assert speaker.asked == []
    assert "There is no command /quit" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_keeps_its_beginning() -> None:
    speaker = Echo()
    speaker.problem = KeyboardInterrupt()
    converse(speaker, [], lines("one", "two"))
    assert speaker.asked[1][1] == {"role": "assistant", "content": "got "}
    assert speaker.closed == 2


def test_ctrl_c_at_the_prompt_only_says_how_to_leave(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Echo()
    converse(speaker, [], lines(KeyboardInterrupt(), "one"))
    assert len(speaker.asked) == 1
    assert capsys.readouterr().out.count("Ctrl-D leaves") == 2


def test_a_question_that_failed_is_not_part_of_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Echo()
    speaker.problem = RequestError("too long")
    converse(speaker, [], lines("one", "two"))
    assert len(speaker.asked[1]) == 1
    assert "[too long]" in capsys.readouterr().out


def test_a_server_is_asked_for_its_model_and_streams(server: Any) -> None:
    speaker = ServerSpeaker(server.url, None, "secret", {"max_tokens": 4})
    assert speaker.name == f"tiny at {server.url}"
    messages = [{"role": "user", "content": "hello"}]
    assert "".join(speaker.answer(messages)) == "abab"
    assert server.bodies == [{"model": "tiny", "messages": messages, "stream": True, "max_tokens": 4}]
    assert server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(("behaviour", "reason"), [("refuse", "HTTP 429: queue full"), ("error", "engine died")])
def test_what_a_server_refuses_is_told(server: Any, behaviour: str, reason: str) -> None:
    server.behaviour[-1] = behaviour
    speaker = ServerSpeaker(server.url, "tiny", None, {"max_tokens": 4})
    with pytest.raises(RequestError, match=reason):
        list(speaker.answer([{"role": "user", "content": "hello"}]))


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        ServerSpeaker("http://127.0.0.1:9", None, None, {})
    with pytest.raises(ConfigError, match="must look like"):
        ServerSpeaker("localhost", None, None, {})


class FakeEngine:
    """As much of an LLM as a conversation needs; delivers its deltas at once."""

    info = SimpleNamespace(model="tiny", device="cpu", dtype="float32", max_model_len=64)

    def __init__(self, *deltas: CompletionDelta) -> None:
        self.deltas = deltas
        self.aborted: list[str] = []
        self.text = self.frontend = self.client = self

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return [len(messages)]

    def submit(self, prompt: Sequence[int], params: Any, sink: Callable[[CompletionDelta], None]) -> str:
        for delta in self.deltas:
            sink(delta)
        return "request"

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def test_an_engine_streams_until_it_has_finished() -> None:
    engine = FakeEngine(CompletionDelta(0, "a", [1]), CompletionDelta(0, "b", [2], finish_reason=FinishReason.STOP))
    assert list(EngineSpeaker(engine, None).answer([])) == ["a", "b"]
    assert engine.aborted == []


def test_an_answer_that_is_closed_early_is_aborted() -> None:
    engine = FakeEngine(CompletionDelta(0, "a", [1]))
    answer = EngineSpeaker(engine, None).answer([])
    assert next(answer) == "a"
    answer.close()
    assert engine.aborted == ["request"]


def test_an_engines_error_is_told() -> None:
    engine = FakeEngine(CompletionDelta(0, "", [], finish_reason=FinishReason.ERROR, error="engine died"))
    with pytest.raises(RequestError, match="engine died"):
        list(EngineSpeaker(engine, None).answer([]))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--url", "http://x", "--dtype", "float16"], "--url talks to a running server, where dtype cannot be set"),
        (["--api-key", "x"], "--api-key is for a running server"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *words]) == 2
    assert reason in capsys.readouterr().err


def test_only_sampling_options_that_differ_from_a_servers_defaults_are_sent(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", "--url", server.url, "--max-tokens", "4", "--temperature", "0.5", "--stop", "x"]) == 0
    assert {name: server.bodies[0][name] for name in set(server.bodies[0]) - {"messages", "model", "stream"}} == {
        "max_tokens": 4,
        "temperature": 0.5,
        "stop": ["x"],
    }


def test_a_tiny_model_chats(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nmore\n/exit\n"))
    assert main(["chat", model, "--load-format", "dummy", "--num-blocks", "64", "--max-tokens", "5"]) == 0
    output = capsys.readouterr().out
    assert "up to 128 tokens" in output
    assert output.count("> ") == 3
    assert re.search(r"^\[.*\]$", output, re.MULTILINE) is None  # no error; what it says may have brackets
