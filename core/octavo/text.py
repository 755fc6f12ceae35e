"""Text on one side, token ids on the other: chat templates, exact token bytes, incremental decoding, stop strings.

The engine knows no text; everything here runs on the API side. Decoding rests on one fact: a token stands for fixed
bytes (:meth:`TextProcessor.token_bytes`), so the text of many tokens is their joined bytes read as UTF-8, and an
incremental UTF-8 decoder is all that streaming needs. No torch here, and transformers only through the tokenizer that
is handed in.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


METASPACE = "\u2581"  # how SentencePiece writes a space

# apply_chat_template's own parameters, and what it hands to every template: a request must not replace them
RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class TextProcessor:
    """A tokenizer as the API side uses it. Safe to use from several threads.

    Args:
        tokenizer: a tokenizer of transformers that is backed by the ``tokenizers`` library.
        vocab_size: how many token ids the model knows; may be larger than the tokenizer's vocabulary.
        eos_token_ids: tokens that end a sequence; None: the tokenizer's own.
        chat_template: Jinja text that replaces the tokenizer's own template.

    Raises:
        ConfigError: the tokenizer has no ``tokenizers`` backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} is not backed by the tokenizers library; "
                f"name one that has a tokenizer.json with --tokenizer"
            )
        backend.no_truncation()  # some tokenizer.json files carry training-time limits
        backend.no_padding()
        self._tokenizer: Any = tokenizer
        self._backend = backend
        self._chat_template = chat_template
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        own = collect_eos_token_ids(tokenizer) if eos_token_ids is None else eos_token_ids
        self.eos_token_ids: frozenset[int] = frozenset(own)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_token_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._decoder = _TokenDecoder(backend.decoder)
        self.bytes_of: Mapping[int, bytes] = _Memory(self._find_bytes)

    # --- text to tokens ----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens`` as the tokenizer begins and ends a document."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; see :meth:`render_chat`. The template brings its own special tokens."""
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the model's chat template makes of a conversation, in a sandbox.

        Raises:
            RequestError: there is no template, a message is not understood, or the template itself refuses; in the
                last case the message is the template's.
        """
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; start the server with --chat-template FILE, or use completions",
                code="no_chat_template",
            )
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt starts a new message and continue_final_message continues the last one; "
                "set one of them to false",
                param="continue_final_message",
            )
        kwargs = dict(chat_template_kwargs or {})
        reserved = sorted(kwargs.keys() & RESERVED_TEMPLATE_NAMES)
        if reserved:
            raise RequestError(
                f"chat_template_kwargs must not contain {', '.join(reserved)}", param="chat_template_kwargs"
            )
        plain = [_plain_message(message, index) for index, message in enumerate(_require_messages(messages))]
        if self._template_takes_parts:
            plain = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
        return self._render(
            plain,
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None or bool(self._tokenizer.chat_template)

    def bad_token_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Token sequences that must not appear so that no word does: each word as a text's start and after a space."""
        sequences: list[list[int]] = []
        for word in words:
            plain = self.encode(word, add_special_tokens=False)
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            if spaced[-len(plain) :] == plain:  # banned already: the word is spelt the same after a space
                spaced = []
            sequences += [ids for ids in (plain, spaced) if ids and ids not in sequences]
        return sequences

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self._chat_template, tokenize=False, **kwargs
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(f"the chat template refuses this conversation: {error}", param="messages") from error
        return text

    @functools.cached_property
    def _template_takes_parts(self) -> bool:
        """Whether the template shows a message's text only when it comes as a list of parts."""
        probe = "octavo-probe"
        return not self._shows(probe, probe) and self._shows([{"type": "text", "text": probe}], probe)

    def _shows(self, content: Any, probe: str) -> bool:
        try:
            text = self._render([{"role": "user", "content": content}])
        except RequestError:
            return False
        return probe in text and "'text'" not in text  # a list that was printed as Python prints it is not shown

    # --- tokens to text ----------------------------------------------------------------------------------------------

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True, *, continues: bool = False) -> str:
        """The text of ``token_ids``; bytes that are no UTF-8 become U+FFFD.

        ``continues`` says that the tokens follow other text: SentencePiece tokenizers put a space before a text's first
        word, which is taken away again unless it stands between two words.
        """
        detokenizer = Detokenizer(self, skip_special_tokens)
        text = detokenizer.push(token_ids) + detokenizer.flush()
        if self._decoder.strips_first_space and not continues:
            return text.removeprefix(" ")
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for; empty for an id that the tokenizer does not know."""
        return self.bytes_of[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        data = self._added.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            data = b"" if token is None else self._decoder.bytes_of(token)
        return data

    def token_text(self, token_id: int) -> str:
        """A token on its own as text; a piece of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class _Memory(dict[int, bytes]):
    """A function's values, found once each: looking one up again costs what a dictionary costs, for every token."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        self._find = find

    def __missing__(self, key: int) -> bytes:
        value = self[key] = self._find(key)
        return value


class _TokenDecoder:
    """From a vocabulary entry to its bytes, as the tokenizer's decoder pipeline says."""

    def __init__(self, decoder: Any) -> None:
        pipeline = _flatten_decoder(json.loads(decoder.__getstate__())) if decoder is not None else []
        kinds = {step["type"] for step in pipeline}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in pipeline
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        self._replacements += [(step["replacement"], " ") for step in pipeline if step["type"] == "Metaspace"]
        self.strips_first_space = any(
            (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in pipeline
        )
        self._byte_of = byte_level_alphabet() if self._byte_level else {}

    def bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes([self._byte_of[character] for character in token])
            except KeyError:  # not written in the byte alphabet: stands for itself
                return token.encode()
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _flatten_decoder(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] == "Sequence":
        return [inner for part in step["decoders"] for inner in _flatten_decoder(part)]
    return [step]


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies, as GPT-2 defined it.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Detokenizer:
    """Turns tokens into text as they come; never shows part of a character that later tokens complete.

    All pieces and :meth:`flush` joined are ``text.decode(all token ids, continues=True)``. Each push costs as much as
    its own tokens, however long the text has become.
    """

    def __init__(self, text: TextProcessor, skip_special_tokens: bool = True) -> None:
        self._bytes_of = text.bytes_of
        self._hidden = text.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        bytes_of, hidden = self._bytes_of, self._hidden
        return self._decoder.decode(b"".join([bytes_of[token_id] for token_id in token_ids if token_id not in hidden]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, holding back only what might still become one.

    The stop string that is complete first wins, of several complete at the same character the longest; so the result
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._first = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string when one was found; nothing may be pushed after that."""
        text = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            end, start, stop = found
            self._held = ""
            return text[: end if self._include else start], stop
        keep = self._could_begin(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """Where the longest suffix of ``text`` starts that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first:
                suffix = text[start:]
                if any(stop.startswith(suffix) for stop in self._stops):
                    return start
        return len(text)


def collect_eos_token_ids(tokenizer: PreTrainedTokenizerBase, *configs: Mapping[str, Any]) -> frozenset[int]:
    """Every end-of-sequence token that the tokenizer or one of the configurations (``eos_token_id``) names."""
    found: set[int] = set()
    for value in (getattr(tokenizer, "eos_token_id", None), *(config.get("eos_token_id") for config in configs)):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)


def _require_messages(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    return messages


def _plain_message(message: Any, index: int) -> dict[str, Any]:
    """The message with its content as one string."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with a role and a content", param=where)
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(f"{where}.role must be a string such as 'user'", param=f"{where}.role")
    return {**message, "content": _plain_content(message.get("content"), f"{where}.content")}


def _plain_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} must be a string or a list of parts", param=where)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise RequestError(f"{where}[{index}] must be an object with a type", param=where)
        if part["type"] != "text":
            raise RequestError(
                f"{where}[{index}] is of type '{part['type']}', but this model takes text only", param=where
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{index}].text must be a string", param=where)
        texts.append(part["text"])
    return "\n".join(texts)
