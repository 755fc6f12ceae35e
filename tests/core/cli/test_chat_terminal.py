"""``octavo chat`` in a terminal of its own: keys typed at awkward moments, and that it always leaves."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
pytestmark = pytest.mark.slow  # a process for each test

CTRL_C, CTRL_D = b"\x03", b"\x04"
PROMPT, STOPPED = b"> ", b"[stopped]"


class Terminal:
    """What a user sees and types."""

    def __init__(self, process: int, terminal: int) -> None:
        self._process = process
        self._terminal = terminal
        self._ended = False
        self.shown = b""

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def ask(self) -> None:
        """Ask for a story and see it begin."""
        self.type(b"go on\n")
        self.wait_for(b"go on\r\n")
        deadline = time.monotonic() + 60.0
        while not self.shown:
            assert time.monotonic() < deadline, "no answer began"
            assert self._read(), "it ended before it answered"

    def wait_for(self, text: bytes, seconds: float = 60.0) -> None:
        """Until ``text`` is shown; forgets what was shown up to it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown, but {self.shown[-500:]!r}"
            assert self._read(), f"it ended before it showed {text!r}: {self.shown[-500:]!r}"
        self.shown = self.shown.partition(text)[2]

    def status(self, seconds: float = 15.0) -> int:
        """The exit status; the program must end in time."""
        deadline = time.monotonic() + seconds
        while not self._ended:
            assert time.monotonic() < deadline, f"it does not leave; it shows {self.shown[-500:]!r}"
            self._read()
            process, status = os.waitpid(self._process, os.WNOHANG)
            self._ended = process != 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if not self._ended:
            os.kill(self._process, 9)
            os.waitpid(self._process, 0)
        os.close(self._terminal)

    def _read(self) -> bool:
        """Take in what there is, waiting a little; false at the end."""
        if not select.select([self._terminal], [], [], 0.05)[0]:
            return True
        try:
            self.shown += os.read(self._terminal, 65536)
        except OSError:  # the other end is closed
            return False
        return True


@pytest.fixture
def endless_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model without any token that ends an answer: one sampled by chance would end it before a key is typed."""
    path = tmp_path / "endless-llama"
    shutil.copytree(tiny_llama, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def chat(model: Path, max_tokens: int) -> Iterator[Terminal]:
    """A conversation with a model that would go on for minutes if it were let."""
    length = json.dumps({"max_position_embeddings": 65536})
    words = ["--hf-overrides", length, "--cpu-kv-cache-gib", "0.1", "--max-tokens", str(max_tokens)]
    process, terminal = pty.fork()
    if process == 0:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TERM": "dumb"}
        os.execve(sys.executable, [sys.executable, "-m", "octavo", "chat", str(model), *words], environment)
    user = Terminal(process, terminal)
    try:
        user.wait_for(b"Ctrl-D leaves")
        user.wait_for(PROMPT)
        yield user
    finally:
        user.close()


def test_interrupting_answers_again_and_again_and_leaving_at_once(endless_llama: Path) -> None:
    with chat(endless_llama, 60000) as user:
        for _ in range(4):
            user.ask()
            user.type(CTRL_C)
            user.wait_for(STOPPED)
            user.wait_for(PROMPT)
        user.ask()
        user.type(CTRL_C + CTRL_D)  # the second before the prompt is there
        assert user.status() == 0


def test_ctrl_d_during_an_answer_leaves_after_it(endless_llama: Path) -> None:
    with chat(endless_llama, 200) as user:
        user.ask()
        user.type(CTRL_D)
        assert user.status() == 0
