"""``octavo chat``: talk to a model in the terminal, in this process or on a running server."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import queue
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from octavo.cli.options import engine_config, engine_options_given
from octavo.cli.sampling import add_sampling_options, sampling_fields, sampling_params
from octavo.errors import ConfigError, OctavoError, RequestError

if TYPE_CHECKING:
    from octavo.llm import LLM
    from octavo.outputs import CompletionDelta
    from octavo.request import SamplingParams

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."

Message = Mapping[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to talk to and how to sample."""
    group = parser.add_argument_group("conversation")
    group.add_argument("--url", metavar="URL", help="a running server, such as http://127.0.0.1:8000; else start here")
    group.add_argument("--api-key", metavar="KEY", help="of that server (default: the environment's OPENAI_API_KEY)")
    group.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    add_sampling_options(parser, max_tokens=1024)


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves; returns the exit status."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.url is not None:
        unused = engine_options_given(args)
        if unused:
            raise ConfigError(f"--url talks to a running server, where {', '.join(unused)} cannot be set; leave it out")
        key = args.api_key or os.environ.get("OPENAI_API_KEY")
        converse(ServerSpeaker(args.url, vars(args).get("model"), key, sampling_fields(args)), system)
        return 0
    if args.api_key is not None:
        raise ConfigError("--api-key is for a running server; name it with --url")
    from octavo.llm import LLM

    params = sampling_params(args)
    with LLM.from_config(engine_config(args)) as llm:
        converse(EngineSpeaker(llm, params), system)
    return 0


class Speaker(Protocol):
    """Whoever answers."""

    name: str

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """The answer in pieces as they come; closing the generator stops it. Raises OctavoError."""
        ...


def converse(speaker: Speaker, system: Sequence[Message], read: Callable[[str], str] = input) -> None:
    """Read lines, stream answers, until /exit or the end of the input."""
    with _line_editing() if sys.stdin.isatty() else contextlib.nullcontext():
        _converse(speaker, system, read)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """History and editing in ``input()``, where the platform has them.

    From beginning to end the terminal passes single bytes on. If it went back to collecting lines during an answer, a
    Ctrl-D typed then would reach readline, which reads bytes again, as another key, and the conversation would not end.
    """
    try:
        import readline  # noqa: F401
        import termios
    except ImportError:
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    single_bytes = termios.tcgetattr(terminal)
    single_bytes[3] &= ~termios.ICANON
    termios.tcsetattr(terminal, termios.TCSADRAIN, single_bytes)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _converse(speaker: Speaker, system: Sequence[Message], read: Callable[[str], str]) -> None:
    print(f"{speaker.name}\n{HELP}\n")
    messages = list(system)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(system)
            print("The conversation is forgotten.\n")
        elif line.startswith("/"):
            print(f"There is no command {line.split()[0]}. {HELP}\n")
        elif line:
            _exchange(speaker, messages, line)


def _exchange(speaker: Speaker, messages: list[Message], line: str) -> None:
    """One question and its answer, which join ``messages``; a question that failed does not."""
    pieces: list[str] = []
    question = {"role": "user", "content": line}
    try:
        with contextlib.closing(speaker.answer([*messages, question])) as answer:
            for piece in answer:
                print(piece, end="", flush=True)
                pieces.append(piece)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except OctavoError as error:
        print(f"\n[{error}]\n")
        return
    print("\n")
    messages += [question, {"role": "assistant", "content": "".join(pieces)}]


class EngineSpeaker:
    """Answers from an engine in this process."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        info = llm.client.info
        self.name = f"{info.model} on {info.device}, {info.dtype}, up to {info.max_model_len} tokens"
        self._llm = llm
        self._params = params

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        deltas: queue.SimpleQueue[CompletionDelta] = queue.SimpleQueue()
        prompt = self._llm.text.encode_chat(list(messages))
        request_id = self._llm.frontend.submit(prompt, self._params, deltas.put)
        finished = False
        try:
            while not finished:
                delta = deltas.get()
                if delta.error is not None:
                    raise RequestError(delta.error)
                yield delta.text
                finished = delta.finish_reason is not None
        finally:
            if not finished:
                self._llm.frontend.abort(request_id)


class ServerSpeaker:
    """Answers from an OpenAI-compatible server."""

    def __init__(self, url: str, model: str | None, api_key: str | None, sampling: Mapping[str, Any]) -> None:
        """Asks the server for its first model when none is named.

        Raises:
            ConfigError: the address is unusable, or the server cannot be reached or refuses.
        """
        self._parts = urlsplit(url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise ConfigError(f"--url '{url}' must look like http://HOST:PORT")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._sampling = dict(sampling)
        self._model = model or self._first_model()
        self.name = f"{self._model} at {url}"

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        body = {"model": self._model, "messages": list(messages), "stream": True, **self._sampling}
        with contextlib.closing(self._connection()) as connection:
            response = self._ask(connection, "POST", "/v1/chat/completions", json.dumps(body).encode())
            while line := self._read(response):
                if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RequestError(_reason(event))
                for choice in event.get("choices", ()):
                    yield choice["delta"].get("content") or ""

    def _first_model(self) -> str:
        with contextlib.closing(self._connection()) as connection:
            models = json.loads(self._ask(connection, "GET", "/v1/models").read())
        return str(models["data"][0]["id"])

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.netloc)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"the server at {self._parts.netloc} cannot be reached: {error}") from error
        if response.status != 200:
            raise RequestError(f"HTTP {response.status}: {_reason_of_bytes(response.read())}")
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline()
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"the connection broke: {error}") from error


def _reason_of_bytes(body: bytes) -> str:
    try:
        return _reason(json.loads(body))
    except ValueError:
        return body.decode(errors="replace")[:200]


def _reason(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
