"""What is asked of a server: prompts with the number of tokens to generate, the same for the same arguments."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy

from octavo.errors import ConfigError

FIRST_PLAIN_TOKEN = 10
"""Ids below this are left out of invented prompts: most vocabularies begin with special tokens."""


class Tokenizer(Protocol):
    """What datasets need of a tokenizer; that of Transformers has it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One prompt, as text or as token ids or both, and how many tokens to generate."""

    num_prompt_tokens: int
    num_output_tokens: int
    token_ids: Sequence[int] | None = None
    text: str | None = None


def random_requests(
    num_requests: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    vocab_size: int,
    seed: int,
) -> list[BenchRequest]:
    """Uniformly random token ids. Lengths are uniform within ``range_ratio`` of the given ones, either way; every
    prompt begins with the same ``prefix_len`` tokens, which come on top of ``input_len``.

    Raises:
        ConfigError: a length below 1, a ratio outside [0, 1), or a vocabulary without plain tokens.
    """
    _require("random input length", input_len, 1)
    _require("random output length", output_len, 1)
    _require("random prefix length", prefix_len, 0)
    _require("vocabulary size", vocab_size, FIRST_PLAIN_TOKEN + 1)
    if not 0.0 <= range_ratio < 1.0:
        raise ConfigError(f"random range ratio must be at least 0 and below 1, not {range_ratio}")
    generator = numpy.random.default_rng(seed)

    def length(mean: int) -> int:
        low, high = max(1, int(mean * (1 - range_ratio))), int(numpy.ceil(mean * (1 + range_ratio)))
        return int(generator.integers(low, high + 1))

    def tokens(count: int) -> list[int]:
        return [int(token) for token in generator.integers(FIRST_PLAIN_TOKEN, vocab_size, count)]

    prefix = tokens(prefix_len)
    requests = []
    for _ in range(num_requests):
        prompt = prefix + tokens(length(input_len))
        requests.append(BenchRequest(len(prompt), length(output_len), prompt))
    return requests


def trace_requests(path: Path, num_requests: int | None, *, vocab_size: int, salt: int = 0) -> list[BenchRequest]:
    """Requests of a trace file: JSON with ``prompt_len`` and ``output_len``, in tokens, one entry for each request.

    Token ids follow from the request's position and ``salt`` by the rule that the file states, so that every server
    is asked the same; ids outside the vocabulary are folded into it. ``None`` takes the whole trace.

    Raises:
        ConfigError: the file cannot be read, is no trace, or holds fewer requests.
    """
    trace = _read_json(path)
    lengths = trace if isinstance(trace, dict) else {}
    prompts, outputs = lengths.get("prompt_len"), lengths.get("output_len")
    if not isinstance(prompts, list) or not isinstance(outputs, list) or len(prompts) != len(outputs):
        raise ConfigError(f"{path} is no trace: it needs the lists prompt_len and output_len, equally long")
    num_requests = len(prompts) if num_requests is None else num_requests
    if num_requests > len(prompts):
        raise ConfigError(f"{path} holds {len(prompts)} requests, not {num_requests}; lower --num-prompts")
    _require("vocabulary size", vocab_size, FIRST_PLAIN_TOKEN + 1)
    return [
        BenchRequest(prompts[i], outputs[i], [_fold(token, vocab_size) for token in trace_tokens(i, prompts[i], salt)])
        for i in range(num_requests)
    ]


def trace_tokens(index: int, count: int, salt: int = 0) -> list[int]:
    """The trace files' ``token_rule``: ids from 10 to 127,999."""
    generator = random.Random(7 * 1000003 + index * 7919 + salt * 104729)
    return [10 + int(generator.random() * (128000 - 10)) for _ in range(count)]


def sharegpt_requests(
    path: Path, num_requests: int | None, tokenizer: Tokenizer, *, output_len: int | None = None, seed: int
) -> list[BenchRequest]:
    """The first exchange of conversations of a ShareGPT file, shuffled by ``seed``.

    As in vLLM's client: the answer's length is the number of tokens to generate (unless ``output_len`` says another);
    prompts or answers below 4 tokens, prompts above 1024 and sums above 2048 are left out. ``None`` takes all.

    Raises:
        ConfigError: the file cannot be read, is of another form, or holds too few conversations.
    """
    conversations = _read_json(path)
    if not isinstance(conversations, list):
        raise ConfigError(f"{path} is no ShareGPT file: it must be a JSON list of conversations")
    exchanges = list(_exchanges(path, conversations))
    random.Random(seed).shuffle(exchanges)
    requests = list(itertools.islice(_fitting(exchanges, tokenizer, output_len), num_requests))
    if num_requests is not None and len(requests) < num_requests:
        raise ConfigError(f"{path} holds {len(requests)} usable conversations, not {num_requests}; lower --num-prompts")
    return requests


def _exchanges(path: Path, conversations: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for position, conversation in enumerate(conversations):
        try:
            turns = conversation["conversations"]
            if len(turns) >= 2:
                yield str(turns[0]["value"]), str(turns[1]["value"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: conversation {position} has no 'conversations' with 'value' entries") from error


def _fitting(
    exchanges: Sequence[tuple[str, str]], tokenizer: Tokenizer, output_len: int | None
) -> Iterator[BenchRequest]:
    for prompt, answer in exchanges:
        token_ids = tokenizer.encode(prompt, add_special_tokens=True)
        num_output = output_len or len(tokenizer.encode(answer, add_special_tokens=False))
        if 4 <= len(token_ids) <= 1024 and num_output >= 4 and len(token_ids) + num_output <= 2048:
            yield BenchRequest(len(token_ids), num_output, token_ids, prompt)


def as_text(requests: Sequence[BenchRequest], tokenizer: Tokenizer) -> list[BenchRequest]:
    """The same requests with text, for servers that take no token ids. Decoding and encoding again may change the
    number of tokens a little; reports use the server's own count where it sends one."""
    return [
        request
        if request.text is not None
        else BenchRequest(
            request.num_prompt_tokens,
            request.num_output_tokens,
            request.token_ids,
            tokenizer.decode(request.token_ids or (), skip_special_tokens=True),
        )
        for request in requests
    ]


def _fold(token: int, vocab_size: int) -> int:
    if token < vocab_size:
        return token
    return FIRST_PLAIN_TOKEN + (token - FIRST_PLAIN_TOKEN) % (vocab_size - FIRST_PLAIN_TOKEN)


def _require(what: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{what} must be at least {least}, not {value}")


def _read_json(path: Path) -> Mapping[str, Any] | list[Any]:
    try:
        content: Mapping[str, Any] | list[Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return content
