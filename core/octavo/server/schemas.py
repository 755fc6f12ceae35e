"""What clients may send: typed bodies, and the fields that are known but not served.

A body is read in three steps, each with its own error: it is JSON; every field is known and served; every value has
the right type. Nothing is accepted and ignored, except values that ask for nothing.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any, Literal, TypeVar

import msgspec

from octavo.errors import RequestError
from octavo.request import SamplingParams

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_PROMPTS = 1024


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """The fields that chat and completions share; null means the default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None


class CompletionBody(Sampling, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class ChatBody(Sampling, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """``POST /tokenize``: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


UNSERVED: dict[str, tuple[Any, ...]] = {
    # field -> the values that ask for nothing
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "verbosity": (None,),
    "suffix": (None, ""),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "use_beam_search": (None, False),
    "truncate_prompt_tokens": (None,),
    "prompt_embeds": (None,),
}
"""Fields of OpenAI's API and of its relatives that this server knows and does not serve."""

Body = TypeVar("Body", bound=msgspec.Struct)


class BodyReader:
    """Turns request bodies into structures; remembers which unknown fields were reported when they are ignored."""

    def __init__(self, unknown_fields: Literal["refuse", "ignore"] = "refuse") -> None:
        self._ignore = unknown_fields == "ignore"
        self._reported: set[str] = set()

    def read(self, data: bytes, kind: type[Body]) -> Body:
        """Raises RequestError naming the field, what is wrong with it and, for unknown ones, the nearest known."""
        try:
            content = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(content, dict):
            raise RequestError(f"the body must be a JSON object, not {type(content).__name__}", code="invalid_json")
        self._check_fields(content, kind)
        try:
            return msgspec.convert(content, kind)
        except (msgspec.ValidationError, RecursionError) as error:
            message, _, path = str(error).partition(" - at `$.")
            field = path.rstrip("`").split("[")[0].split(".")[0] or None
            raise RequestError(f"{field}: {message}" if field else message, param=field) from error

    def _check_fields(self, content: dict[str, Any], kind: type[msgspec.Struct]) -> None:
        known = set(kind.__struct_fields__)
        strange = [name for name in content if name not in known]
        for name in strange:
            if name in UNSERVED and content[name] not in UNSERVED[name]:
                raise RequestError(
                    f"'{name}' is not served by this server; leave it out", param=name, code="unsupported_parameter"
                )
        unknown = [name for name in strange if name not in UNSERVED]
        if not unknown:
            return
        if self._ignore:
            new = sorted(set(unknown) - self._reported)
            if new and len(self._reported) < 1000:  # a client that invents names must not fill the log
                self._reported.update(new)
                logger.warning("ignoring unknown fields: %s", ", ".join(new))
            return
        described = []
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            described.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        raise RequestError(
            f"unknown field{'s' if len(unknown) > 1 else ''} {', '.join(described)}",
            param=unknown[0],
            code="unknown_parameter",
        )


SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
"""Fields that are called the same in a body and in :class:`~octavo.request.SamplingParams`."""


def sampling_params(body: Sampling, defaults: dict[str, Any], **special: Any) -> SamplingParams:
    """A body's parameters: what it says, else the model's ``defaults``; ``special`` are those that differ by route."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream=true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs is not available in a stream", param="prompt_logprobs")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise RequestError(
            f"stop takes at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters", param="stop"
        )
    given = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    return SamplingParams(**{**defaults, **given, "logit_bias": _logit_bias(body.logit_bias), **special})


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    wrong = [key for key in bias if not (key.isascii() and key.isdigit())]
    if wrong:
        raise RequestError(f"logit_bias: not token ids: {', '.join(wrong)}", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def prompts_of(prompt: str | list[Any]) -> list[str | list[int | str]]:
    """The prompts of a completions body: a text, a list of token ids (texts may be mixed in), or a list of those."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt must not be empty", param="prompt")
    if isinstance(prompt[0], int) and not isinstance(prompt[0], bool):
        return [_mixed(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt lists {len(prompt)} prompts; at most {MAX_PROMPTS} are taken", param="prompt")
    return [one if isinstance(one, str) else _mixed(one) for one in prompt]


def _mixed(prompt: Any) -> list[int | str]:
    if not isinstance(prompt, list) or not prompt:
        raise RequestError("every prompt must be a text or a list of token ids that is not empty", param="prompt")
    if not all(isinstance(part, str) or (isinstance(part, int) and not isinstance(part, bool)) for part in prompt):
        raise RequestError("a prompt that is a list holds token ids and texts only", param="prompt")
    return prompt
