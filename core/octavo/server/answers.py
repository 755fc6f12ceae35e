"""What OpenAI's endpoints answer with: whole, or in the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from octavo.outputs import Completion, CompletionDelta, Logprob, PositionLogprobs
from octavo.server.schemas import ChatBody, CompletionBody, Sampling

PromptLogprobs = Sequence[PositionLogprobs | None]


class Usage:
    """Counts tokens. A prompt counts once, however many samples it has."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._num_prompt = sum(map(len, prompts))
        self._num_output = 0
        self._num_cached = [0] * len(prompts)

    def count(self, prompt: int, num_output: int, num_cached: int) -> None:
        """More output of the prompt with that number, and how much of it was cached, which one of its samples tells."""
        self._num_output += num_output
        self._num_cached[prompt] = max(self._num_cached[prompt], num_cached)

    def content(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached)},
        }


class Answer(ABC):
    """How one endpoint writes what was generated to one request."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, model: str, fingerprint: str, body: Sampling, prompts: list[list[int]]) -> None:
        self.prompts = prompts
        self._body = body
        self._common = {
            "id": f"{self.prefix}-{body.request_id or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._begun: set[int] = set()

    def remember(self, prompt: int, logprobs: PromptLogprobs | None) -> None:
        """The log-probabilities of a prompt's own tokens; told before its first choice is written."""
        if logprobs is not None:
            self._prompt_logprobs[prompt] = logprobs

    @abstractmethod
    def whole(self, completions: Sequence[tuple[int, int, Completion]]) -> dict[str, Any]:
        """The whole answer, without usage, from (choice's index, prompt's number, sample)."""

    @abstractmethod
    def chunks(self, index: int, prompt: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """The chunks that a delta of the choice ``index`` becomes: none when it has nothing to say yet."""

    def differs_in_text_alone(self, delta: CompletionDelta) -> bool:
        """Whether the chunks of this choice that say only text, from now on, are all alike but for it.

        ``delta`` is one whose chunks have been written.
        """
        body = self._body
        return (
            bool(delta.text) and delta.logprobs is None and not body.return_token_ids and body.prompt_logprobs is None
        )

    def empty_chunk(self) -> dict[str, Any]:
        """The chunk that carries nothing but usage."""
        return self._piece(self.chunk_object, [])

    def _piece(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": kind, **self._common, "choices": choices}

    def _begins(self, index: int) -> bool:
        """Whether nothing has been sent for this choice before."""
        begins = index not in self._begun
        self._begun.add(index)
        return begins

    def _says_something(self, delta: CompletionDelta) -> bool:
        shows_ids = bool(self._body.return_token_ids and delta.token_ids)
        return bool(delta.text or delta.logprobs or delta.finish_reason or shows_ids)


class ChatAnswer(Answer):
    """``chat.completion``."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, fingerprint: str, body: ChatBody, prompt: list[int]) -> None:
        super().__init__(model, fingerprint, body, [prompt])

    def whole(self, completions: Sequence[tuple[int, int, Completion]]) -> dict[str, Any]:
        """See :meth:`Answer.whole`."""
        choices = []
        for index, _, completion in completions:
            message = {"role": "assistant", "content": completion.text, "refusal": None}
            choices.append(self._choice(index, completion, {"message": message}))
        whole = self._piece(self.whole_object, choices)
        if self._body.return_token_ids:
            whole["prompt_token_ids"] = self.prompts[0]
        if self._body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = _prompt_logprobs(self._prompt_logprobs.get(0, ()))
        return whole

    def chunks(self, index: int, prompt: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """See :meth:`Answer.chunks`; the first chunk of a choice says whose turn it is."""
        chunks = []
        if self._begins(index):
            opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            chunks.append(self._piece(self.chunk_object, [{"index": index, **opening}]))
            if self._body.return_token_ids:
                chunks[0]["prompt_token_ids"] = self.prompts[0]
        if self._says_something(delta):
            content = {"content": delta.text} if delta.text else {}
            chunks.append(self._piece(self.chunk_object, [self._choice(index, delta, {"delta": content})]))
        return chunks

    def _choice(self, index: int, part: Completion | CompletionDelta, content: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": index,
            **content,
            "logprobs": _chat_logprobs(part.logprobs),
            "finish_reason": part.finish_reason,
        }
        if part.finish_reason is not None:
            choice["stop_reason"] = part.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = part.token_ids
        return choice


class CompletionAnswer(Answer):
    """``text_completion``; ``echoes`` are the prompts' texts when they are to be echoed, else empty."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, model: str, fingerprint: str, body: CompletionBody, prompts: list[list[int]], echoes: list[str]
    ) -> None:
        super().__init__(model, fingerprint, body, prompts)
        self._echoes = echoes
        self._with_logprobs = body.logprobs is not None
        self._offsets: dict[int, int] = {}

    def whole(self, completions: Sequence[tuple[int, int, Completion]]) -> dict[str, Any]:
        """See :meth:`Answer.whole`."""
        return self._piece(self.whole_object, [self._choice(*item, first=True) for item in completions])

    def chunks(self, index: int, prompt: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """See :meth:`Answer.chunks`; the prompt is echoed with the first chunk of each of its choices."""
        if not self._says_something(delta):
            return []
        choice = self._choice(index, prompt, delta, first=self._begins(index))
        return [self._piece(self.chunk_object, [choice])]

    def _choice(self, index: int, prompt: int, part: Completion | CompletionDelta, *, first: bool) -> dict[str, Any]:
        echo = self._echoes[prompt] if self._echoes and first else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + part.text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if self._with_logprobs and (echo or part.logprobs is not None):
            echoed = self._prompt_logprobs.get(prompt, ()) if echo else ()
            choice["logprobs"] = self._logprobs(index, echo, echoed, part.logprobs or ())
        if self._body.return_token_ids:
            choice["token_ids"] = part.token_ids
            if first:
                choice["prompt_token_ids"] = self.prompts[prompt]
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(self._prompt_logprobs.get(prompt, ()))
        return choice

    def _logprobs(
        self, index: int, echo: str, echoed: PromptLogprobs, logprobs: Sequence[PositionLogprobs]
    ) -> dict[str, list[Any]]:
        content: dict[str, list[Any]] = {"text_offset": [], "tokens": [], "token_logprobs": [], "top_logprobs": []}
        known = [position for position in echoed if position is not None]
        # The prompt's tokens end where its text ends, whatever the tokenizer put before it; its first token has no
        # log-probability and the text that the others leave.
        offset = max(0, len(echo) - sum(len(position.token.text) for position in known))
        if echoed:
            _append(content, 0, echo[:offset], None, None)
        for position in known:
            _append(content, offset, position.token.text, position.token.logprob, _top_logprobs(position))
            offset += len(position.token.text)
        offset = self._offsets.get(index, len(echo))
        for position in logprobs:
            _append(content, offset, position.token.text, position.token.logprob, _top_logprobs(position))
            offset += len(position.token.text)
        self._offsets[index] = offset
        return content


def _append(
    content: Mapping[str, list[Any]], offset: int, text: str, logprob: float | None, top: dict[str, float] | None
) -> None:
    content["text_offset"].append(offset)
    content["tokens"].append(text)
    content["token_logprobs"].append(logprob)
    content["top_logprobs"].append(top)


def _top_logprobs(position: PositionLogprobs) -> dict[str, float]:
    """Texts to log-probabilities. Tokens that are parts of a character have no text of their own: their bytes stand
    for them."""
    top = {_key(one): one.logprob for one in position.top}
    if all(one.token_id != position.token.token_id for one in position.top):
        top[_key(position.token)] = position.token.logprob
    return top


def _key(one: Logprob) -> str:
    try:
        return one.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.data)


def _chat_logprobs(logprobs: Sequence[PositionLogprobs] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None

    def entry(one: Logprob) -> dict[str, Any]:
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}

    content = [{**entry(position.token), "top_logprobs": [entry(one) for one in position.top]} for position in logprobs]
    return {"content": content, "refusal": None}


def _prompt_logprobs(logprobs: PromptLogprobs) -> list[dict[str, Any] | None]:
    """For each of the prompt's tokens, by token id, what is known of it and of the most likely ones."""

    def entry(position: PositionLogprobs | None) -> dict[str, Any] | None:
        if position is None:
            return None
        return {
            str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
            for one in (*position.top, position.token)
        }

    return [entry(position) for position in logprobs]
