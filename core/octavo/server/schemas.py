"""What clients may send: typed bodies, and the fields that are known but not served.

A body is read in three steps, each with its own error: it is JSON; every field is known and served; every value has
the right type. Nothing is accepted and ignored, except values that ask for nothing.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from octavo.errors import RequestError
from octavo.request import MAX_LOGPROBS, SamplingParams

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_BAD_WORDS = 1024
MAX_PROMPTS = 1024
MAX_NAME_LENGTH = 256  # of request_id and cache_salt
MAX_DIGITS = 20  # of a token id in logit_bias
DEFAULT_COMPLETION_TOKENS = 16

Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
Prompt = str | list[int | str]
"""A text, or token ids with texts among them."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """The fields that chat and completions share; null means the default."""

    model: str | None = None
    n: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Integer] | None = None
    prompt_logprobs: Integer | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Name | None = None
    priority: Integer | None = None
    request_id: Name | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None


class CompletionBody(Sampling, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any]
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Integer | None = None
    best_of: Integer | None = None


class ChatBody(Sampling, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def adds_generation_prompt(self) -> bool:
        """Unless it is said otherwise: yes, except where the last message is to be continued."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


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


UNSERVED: Mapping[str, tuple[Any, ...]] = {
    # field -> the values that ask for nothing
    "audio": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    "early_stopping": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_reasoning": (None, True),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1.0),
    "logits_processors": (None, []),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "prompt_embeds": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "return_tokens_as_token_ids": (None, False),
    "service_tier": (None, "auto", "default"),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
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


Defaults = Mapping[str, Any]


def chat_params(body: ChatBody, defaults: Defaults) -> SamplingParams:
    """A chat's parameters; it may fill the context unless it says otherwise.

    Raises:
        RequestError: a value cannot be; names the field.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs is only allowed with logprobs=true", param="top_logprobs")
    if not 0 <= (body.top_logprobs or 0) <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {body.top_logprobs}", param="top_logprobs"
        )
    special: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise RequestError("max_tokens is the old name of max_completion_tokens; give one", param="max_tokens")
        special["max_tokens"] = body.max_completion_tokens
    return _sampling_params(body, {"max_tokens": None, **defaults}, special)


def completion_params(body: CompletionBody, defaults: Defaults) -> SamplingParams:
    """A completion's parameters, :data:`DEFAULT_COMPLETION_TOKENS` unless it says otherwise.

    Raises:
        RequestError: a value cannot be; names the field.
    """
    if body.best_of not in (None, body.n or 1):
        raise RequestError("best_of is not served; use n", param="best_of", code="unsupported_parameter")
    special: dict[str, Any] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:  # the prompt's own are shown beside the output's
        if body.prompt_logprobs not in (None, body.logprobs):
            raise RequestError("with echo, prompt_logprobs must be the same as logprobs", param="prompt_logprobs")
        special["prompt_logprobs"] = body.logprobs
    elif body.echo and body.max_tokens == 0 and body.prompt_logprobs is None:
        special["prompt_logprobs"] = 0  # nothing is generated and nothing shown but the prompt
    return _sampling_params(body, {"max_tokens": DEFAULT_COMPLETION_TOKENS, **defaults}, special)


def _sampling_params(body: Sampling, defaults: Defaults, special: Mapping[str, Any]) -> SamplingParams:
    """What the body says, else the model's ``defaults``; ``special`` are those that chat and completions call
    differently."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream=true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs is not available in a stream", param="prompt_logprobs")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise RequestError(
            f"stop takes at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters", param="stop"
        )
    if len(body.bad_words or ()) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words takes at most {MAX_BAD_WORDS} words", param="bad_words")
    given = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    return SamplingParams(**{**defaults, **given, "logit_bias": _logit_bias(body.logit_bias), **special})


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    wrong = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < MAX_DIGITS)]
    if wrong:
        raise RequestError(
            f"logit_bias: not token ids: {', '.join(key[:32] for key in wrong[:32])}", param="logit_bias"
        )
    return {int(key): value for key, value in bias.items()}


def prompts_of(prompt: str | list[Any]) -> list[Prompt]:
    """The prompts of a completions body: a text, a list of token ids (texts may be mixed in), or a list of those.

    Raises:
        RequestError: there is none, one is empty or of another kind, or there are too many.
    """
    several = isinstance(prompt, list) and bool(prompt) and not _is_token(prompt[0])
    prompts: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt lists {len(prompts)} prompts; at most {MAX_PROMPTS} are taken", param="prompt")
    for one in prompts:
        if not isinstance(one, str | list):
            raise RequestError("a prompt must be a text or a list of token ids", param="prompt")
        if not one:
            raise RequestError("a prompt must not be empty", param="prompt")
        if isinstance(one, list) and not set(map(type, one)) <= {int, str}:
            raise RequestError("a prompt that is a list holds token ids and texts only", param="prompt")
    return prompts


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
