"""A small OpenAI-compatible server that behaves, or misbehaves, as a test wants; and a model too small to wait for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class FakeServer:
    """Answers in a thread of its own. ``behaviour`` maps a request's prompt to one; the default is "answer".

    answer: ``max_tokens`` tokens, two in each event; refuse: status 429; break: half an answer, then the connection
    closes; error: an error event within the stream; empty: no output; silent: nothing until the client gives up;
    plain: an answer without usage; unfinished: a whole stream without a finish reason.
    """

    def __init__(self) -> None:
        self.behaviour: dict[int, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.pause = 0.0
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2048))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            lines = [line.partition(": ") for line in head[1:] if line]
            headers = {name.lower(): value for name, _, value in lines}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if head[0].startswith("GET /v1/models"):
                self._whole(writer, 200, {"data": [{"id": "tiny"}]})
            else:
                self.headers.append(headers)
                self.bodies.append(json.loads(body))
                await self._complete(writer, self.bodies[-1], chat="/chat/" in head[0])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._at_once -= 1
            writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, chat: bool) -> None:
        prompt = body.get("prompt")
        behaviour = self.behaviour.get(prompt[0] if isinstance(prompt, list) else -1, "answer")
        if behaviour == "refuse":
            self._whole(writer, 429, {"error": {"message": "queue full", "code": "queue_full"}})
            return
        if behaviour == "silent":
            await asyncio.sleep(30)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if chat:
            self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        num_tokens = 0 if behaviour == "empty" else body["max_tokens"]
        for sent in range(0, num_tokens, 2):
            await asyncio.sleep(self.pause)
            if behaviour == "break" and sent >= num_tokens // 2:
                writer.write(b"ff\r\ndata: {")  # less than it promises
                return
            if behaviour == "error":
                self._event(writer, {"error": {"message": "engine died"}})
                break
            text = "ab" if sent + 1 < num_tokens else "a"
            self._event(writer, {"choices": [{"index": 0, "delta": {"content": text}} if chat else {"text": text}]})
        else:
            if behaviour != "unfinished":
                end = {"delta": {}} if chat else {"text": ""}
                self._event(writer, {"choices": [{"index": 0, "finish_reason": "length", **end}]})
        if behaviour in ("answer", "empty"):
            usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": 3}}
            self._event(writer, {"choices": [], "usage": usage})
            self._chunk(writer, b"data: [DONE]\n\n")
        self._chunk(writer, b"")

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _whole(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def write_tiny_model(folder: Path) -> str:
    """A configuration and a tokenizer of single bytes, for ``--load-format dummy``; returns the folder's path."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("model"))
