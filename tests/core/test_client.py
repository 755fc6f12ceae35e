"""Clients: what goes in comes back, nobody waits for an engine that is gone, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.engines import make_engine, run, submit

from octavo.client import EngineClient, ProcessClient, ThreadClient
from octavo.config import EngineConfig
from octavo.errors import ConfigError, EngineDead
from octavo.messages import SequenceOutput, StepOutputs
from octavo.request import FinishReason, SamplingParams
from octavo.startup import resolve

CLIENTS = [ThreadClient, ProcessClient]
LONG = SamplingParams(temperature=0.0, max_tokens=None)


@dataclass
class Listener:
    """Collects what a client says, and lets a test wait for it."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    deaths: list[EngineDead] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_outputs(self, outputs: StepOutputs) -> None:
        with self.changed:
            self.outputs += outputs.sequences
            self.changed.notify_all()

    def on_death(self, error: EngineDead) -> None:
        with self.changed:
            self.deaths.append(error)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), "it did not happen in time"

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs if output.request_id == request_id for token in output.token_ids]

    def reason(self, request_id: str) -> FinishReason | None:
        return next((o.finish_reason for o in self.outputs if o.request_id == request_id and o.finish_reason), None)


def config(model: Path, **options: object) -> EngineConfig:
    defaults = {"dtype": "float32", "device": "cpu", "num_blocks": 64, "max_num_seqs": 8, "num_threads": 1}
    return EngineConfig(model=str(model), **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture(params=CLIENTS, ids=["thread", "process"])
def started(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[tuple[EngineClient, Listener]]:
    client, listener = request.param(resolve(config(tiny_llama))), Listener()
    client.start(listener.on_outputs, listener.on_death)
    yield client, listener
    client.close()


@pytest.fixture
def process(tiny_llama: Path) -> Iterator[tuple[ProcessClient, Listener]]:
    client, listener = ProcessClient(resolve(config(tiny_llama))), Listener()
    client.start(listener.on_outputs, listener.on_death)
    yield client, listener
    client.close()


def test_a_client_says_what_its_engine_says(started: tuple[EngineClient, Listener], tiny_llama: Path) -> None:
    client, listener = started
    assert client.info.max_model_len == 256
    params = SamplingParams(max_tokens=8, logprobs=2, prompt_logprobs=1, n=2, seed=3)
    expected = run(make_engine(tiny_llama), [submit("r", [1, 2, 3], params)])
    client.submit(submit("r", [1, 2, 3], params))
    listener.wait(lambda: sum(output.finish_reason is not None for output in listener.outputs) == 2)
    for index in (0, 1):
        mine = [output for output in listener.outputs if output.index == index]
        assert [token for output in mine for token in output.token_ids] == expected["r", index].tokens
        assert [item for output in mine for item in output.logprobs or []] == expected["r", index].logprobs
    assert client.stats.num_blocks == 64


def test_an_aborted_request_ends(started: tuple[EngineClient, Listener]) -> None:
    client, listener = started
    client.submit(submit("r", [1], LONG))
    client.abort("r")
    client.abort("unknown")
    listener.wait(lambda: listener.reason("r"))
    assert listener.reason("r") in (FinishReason.ABORT, FinishReason.LENGTH)


def test_close_with_drain_lets_requests_finish(started: tuple[EngineClient, Listener]) -> None:
    client, listener = started
    client.submit(submit("r", [1], LONG))
    client.close(drain=60.0)
    assert len(listener.tokens("r")) == 255
    assert listener.reason("r") is FinishReason.LENGTH
    listener.wait(lambda: listener.deaths)


def test_close_without_drain_does_not_wait(started: tuple[EngineClient, Listener]) -> None:
    client, listener = started
    for number in range(200):
        client.submit(submit(str(number), [1], LONG))
    client.close()
    assert listener.reason("199") is None
    assert len(listener.deaths) == 1


def test_after_close_everything_says_so(started: tuple[EngineClient, Listener]) -> None:
    client, listener = started
    client.close()
    client.close()
    listener.wait(lambda: listener.deaths)
    assert "shut down" in str(client.dead)
    with pytest.raises(EngineDead, match="shut down"):
        client.submit(submit("r", [1]))
    client.abort("r")


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_client_that_never_started_can_be_closed(kind: type[EngineClient], tiny_llama: Path) -> None:
    kind(resolve(config(tiny_llama))).close()  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", CLIENTS)
def test_what_cannot_work_reaches_the_caller_in_words(kind: type[EngineClient], tiny_llama: Path) -> None:
    client = kind(resolve(config(tiny_llama, attention_backend="imaginary")))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="imaginary"):
        client.start(lambda outputs: None, lambda error: None)
    client.close()


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_listener_that_fails_ends_the_engine_with_the_cause(kind: type[EngineClient], tiny_llama: Path) -> None:
    client, listener = kind(resolve(config(tiny_llama))), Listener()  # type: ignore[call-arg]

    def fail(outputs: StepOutputs) -> None:
        raise ValueError("no room in the listener")

    client.start(fail, listener.on_death)
    client.submit(submit("r", [1]))
    listener.wait(lambda: listener.deaths)
    assert "no room in the listener" in str(client.dead)
    client.close()


# --- the child process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_engine_is_noticed_without_being_asked(process: tuple[ProcessClient, Listener], number: int) -> None:
    client, listener = process
    client.submit(submit("r", [1], LONG))
    listener.wait(lambda: listener.outputs)
    os.kill(client.process_id, number)
    killed = time.monotonic()
    while client.dead is None:  # whoever submits now must not wait for ever
        try:
            client.submit(submit("another", [1]))
        except EngineDead:
            break
        assert time.monotonic() - killed < 10.0
        time.sleep(0.01)
    listener.wait(lambda: listener.deaths)
    assert time.monotonic() - killed < 10.0
    assert f"signal {int(number)}" in str(listener.deaths[0])
    with pytest.raises(EngineDead, match="signal"):
        client.submit(submit("late", [1]))


def test_an_engine_that_cannot_even_be_imported_is_reported(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ProcessClient(resolve(config(tiny_llama)))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineDead, match="exit code 1"):
        client.start(lambda outputs: None, lambda error: None)


def test_a_closed_client_leaves_no_process_and_no_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    num_files = len(os.listdir("/proc/self/fd"))
    client = ProcessClient(resolve(config(tiny_llama)))
    client.start(lambda outputs: None, lambda error: None)
    process_id = client.process_id
    assert list(tmp_path.iterdir())
    client.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) <= num_files + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("octavo-")]


def test_a_child_may_start_before_it_is_known_what_to_build(tiny_llama: Path) -> None:
    client = ProcessClient()
    client.launch()
    client.build(resolve(config(tiny_llama)))
    client.start(lambda outputs: None, lambda error: None)
    assert client.info.num_blocks == 64
    client.close()


def test_a_child_that_is_never_told_what_to_build_is_stopped() -> None:
    client = ProcessClient()
    client.launch()
    process_id = client.process_id
    client.close()
    assert not alive(process_id)


PARENT = """
import sys, time
from octavo.client import ProcessClient
from octavo.config import EngineConfig
from octavo.startup import resolve
client = ProcessClient(resolve(EngineConfig(model=sys.argv[1], num_blocks=64, max_num_seqs=8, num_threads=1)))
client.start(lambda outputs: None, lambda error: None)
print(client.process_id, flush=True)
time.sleep(600)
"""


def test_the_engine_ends_when_its_parent_is_killed(tiny_llama: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tiny_llama)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process_id = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30.0  # nothing else ends it, so a busy machine may take its time
    while alive(process_id):
        assert time.monotonic() < deadline, "the engine outlives its parent"
        time.sleep(0.02)


def alive(process_id: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not count."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or while it was read
        return False
