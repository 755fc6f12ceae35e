"""``octavo serve`` as a process: it starts, drains, and outlives its engine long enough to say why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG = {"prompt": "go on", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 8}


class Served:
    """A running ``octavo serve`` and what it has logged."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--cpu-kv-cache-gib", "0.05"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"listening on (\S+)", line)
            if found:
                self.url = found.group(1)
                break
        assert self.url, "".join(self.log)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def engine_process(self) -> int:
        """The process id of the engine: the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (child,) = map(int, children)
        return child

    def stream(self, body: dict[str, Any]) -> str:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=30.0) as response:
            return "".join(response.iter_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def served(tiny_llama: Path) -> Iterator[Served]:
    made = Served(tiny_llama, "--drain-timeout", "20")
    yield made
    made.stop()


def test_the_log_says_where_the_time_went_and_how_to_ask(served: Served) -> None:
    text = "".join(served.log)
    assert re.search(r"ready: tiny-llama0 \(weights [\d.]+ s, memory [\d.]+ s, .*in all [\d.]+ s\)", text)
    assert "keys and values" in text


def test_a_killed_engine_fails_what_runs_and_the_server_says_why(served: Served) -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(served.stream({**LONG, "n": 128})))
    thread.start()
    time.sleep(0.3)
    os.kill(served.engine_process(), signal.SIGKILL)
    thread.join(timeout=5.0)
    assert not thread.is_alive(), "a client hangs"
    assert "ended unexpectedly with signal 9" in texts[0]
    health = httpx.get(f"{served.url}/health")
    assert health.status_code == 503
    assert "signal 9" in health.json()["error"]["message"]
    refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 503


def test_sigterm_lets_requests_finish_and_refuses_new_ones(served: Served) -> None:
    engine = served.engine_process()
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(served.stream({**LONG, "n": 64})))
    thread.start()
    time.sleep(0.3)
    served.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    try:
        refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"})
        ready = httpx.get(f"{served.url}/ready")
    except httpx.TransportError:  # a fast machine is through with everything
        served.process.wait(timeout=20.0)
    else:
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert ready.status_code == 503
    thread.join(timeout=30.0)
    assert texts[0].count('"finish_reason":"length"') == 64
    assert served.process.wait(timeout=20.0) == 0
    assert not Path(f"/proc/{engine}").exists()


def test_without_a_drain_time_requests_are_aborted_at_once(tiny_llama: Path) -> None:
    served = Served(tiny_llama, "--drain-timeout", "0")
    try:
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(served.stream({**LONG, "n": 64})))
        thread.start()
        time.sleep(0.3)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=10.0) == 0
        thread.join(timeout=5.0)
        assert not thread.is_alive()
    finally:
        served.stop()


def test_a_model_that_is_not_there_ends_the_program_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo", "serve", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert "nothing" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
