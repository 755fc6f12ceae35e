"""Text processing: exact bytes of tokens, incremental decoding, chat templates, stop strings."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from octavo.errors import ConfigError, RequestError
from octavo.text import Detokenizer, StopStrings, TextProcessor, byte_level_alphabet, collect_eos_token_ids

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "我能吞下玻璃而不伤身体。 🎉👩‍👩‍👧 ½ \ufffd",
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


@functools.cache
def sentencepiece() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "▁h",
        "▁w",
        "el",
        "lo",
        "▁hel",
        "▁hello",
        "or",
        "ld",
        "▁wor",
        "▁world",
    ]
    merges = [("▁", "h"), ("▁", "w"), ("e", "l"), ("l", "o"), ("▁h", "el"), ("▁hel", "lo"), ("o", "r"), ("l", "d")]
    merges += [("▁w", "or"), ("▁wor", "ld")]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=["byte-level", "sentencepiece"])
TEXTS = st.text(max_size=40) | st.sampled_from(SENTENCES)


# --- decoding --------------------------------------------------------------------------------------------------------


@TOKENIZERS
@settings(deadline=None)
@given(text=TEXTS)
def test_decode_undoes_encode(make: Any, text: str) -> None:
    processor = TextProcessor(make())
    assert processor.decode(processor.encode(text), skip_special_tokens=False) == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=30), skip=st.booleans())
def test_byte_level_decode_is_what_the_tokenizers_library_says(ids: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    ids = [token_id for token_id in ids if token_id < len(tokenizer)]
    expected = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert TextProcessor(tokenizer).decode(ids, skip) == expected


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30), skip=st.booleans())
def test_sentencepiece_decode_is_what_the_tokenizers_library_says(text: str, skip: bool) -> None:
    tokenizer = sentencepiece()
    ids = [1, *tokenizer.backend_tokenizer.encode(text).ids, 2]
    expected = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert TextProcessor(tokenizer).decode(ids, skip) == expected


@TOKENIZERS
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_whole_text_and_no_piece_has_half_a_character(make: Any, data: Any, skip: bool) -> None:
    processor = TextProcessor(make())
    tokens = st.lists(st.integers(0, processor.vocab_size + 3), max_size=30)  # ids beyond the vocabulary say nothing
    ids = data.draw(tokens | TEXTS.map(processor.encode))
    whole = processor.decode(ids, skip, continues=True)
    detokenizer = Detokenizer(processor, skip)
    shown = ""
    while ids:
        cut = data.draw(st.integers(1, len(ids)))
        shown += detokenizer.push(ids[:cut])
        assert whole.startswith(shown)
        ids = ids[cut:]
    assert shown + detokenizer.flush() == whole


def test_a_character_is_held_back_until_its_last_byte() -> None:
    processor = TextProcessor(byte_level())
    alphabet = byte_level_alphabet()
    token_of = {byte: byte_level().convert_tokens_to_ids(character) for character, byte in alphabet.items()}
    detokenizer = Detokenizer(processor)
    assert [detokenizer.push([token_of[byte]]) for byte in "🎉".encode()] == ["", "", "", "🎉"]
    assert detokenizer.push([token_of[0xF0]]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_special_token_inside_a_character_does_not_break_it_when_hidden() -> None:
    tokenizer = byte_level()
    first, second = (tokenizer.convert_tokens_to_ids(c) for c in ("Ã", "¶"))  # the bytes of ö
    detokenizer = Detokenizer(TextProcessor(tokenizer), skip_special_tokens=True)
    assert detokenizer.push([first, tokenizer.eos_token_id, second]) == "ö"


def test_a_long_text_costs_as_much_per_token_as_a_short_one() -> None:
    processor = TextProcessor(byte_level())
    ids = processor.encode(SENTENCES[0])
    detokenizer = Detokenizer(processor)
    for _ in range(2000):
        detokenizer.push(ids)
    state, _flag = detokenizer._decoder.getstate()
    assert len(state) < 4, "only the bytes of one unfinished character may be kept"


@settings(deadline=None)
@given(text=TEXTS)
def test_bytes_of_tokens_joined_are_the_text(text: str) -> None:
    processor = TextProcessor(byte_level())
    assert b"".join(map(processor.token_bytes, processor.encode(text))) == text.encode()


def test_bytes_of_particular_tokens() -> None:
    bytes_level, pieces = TextProcessor(byte_level()), TextProcessor(sentencepiece())
    assert bytes_level.token_bytes(byte_level().eos_token_id) == b"<|end|>"
    assert bytes_level.token_bytes(byte_level().convert_tokens_to_ids("Ã")) == b"\xc3"
    assert bytes_level.token_text(byte_level().convert_tokens_to_ids("Ã")) == "\ufffd"
    assert pieces.token_bytes(3 + 0xE4) == b"\xe4"
    assert pieces.token_bytes(sentencepiece().convert_tokens_to_ids("▁hello")) == b" hello"
    assert pieces.token_bytes(10_000_000) == b""
    assert pieces.token_bytes(-1) == b""


def test_a_text_that_continues_another_keeps_its_first_space() -> None:
    processor = TextProcessor(sentencepiece())
    ids = processor.encode("hello world")
    assert processor.decode(ids) == "hello world"
    assert processor.decode(ids, continues=True) == " hello world"


def test_special_tokens_are_hidden_and_plain_added_tokens_are_not() -> None:
    processor = TextProcessor(byte_level())
    ids = processor.encode("<|begin|><think>a<|end|>")
    assert processor.decode(ids) == "<think>a"
    assert processor.decode(ids, skip_special_tokens=False) == "<|begin|><think>a<|end|>"


def test_a_tokenizer_without_the_fast_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextProcessor(object())  # type: ignore[arg-type]


def test_truncation_in_the_tokenizer_file_is_switched_off() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert len(TextProcessor(tokenizer).encode("one two three four five")) > 4


def test_eos_tokens_come_from_every_file() -> None:
    tokenizer = byte_level()
    own = tokenizer.eos_token_id
    assert collect_eos_token_ids(tokenizer) == {own}
    assert collect_eos_token_ids(tokenizer, {"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {}) == {own, 7, 8, 9}


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    processor = TextProcessor(sentencepiece())
    assert processor.bad_token_ids(["world"]) == [processor.encode("world")]  # this tokenizer adds the space itself
    processor = TextProcessor(byte_level())
    plain, spaced = processor.encode("fox", False), processor.encode(" fox", False)
    assert plain != spaced
    assert processor.bad_token_ids(["fox", "fox"]) == [plain, spaced]


# --- chat ------------------------------------------------------------------------------------------------------------


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_chat_is_rendered_by_the_template_and_encoded_without_a_second_begin_token() -> None:
    tokenizer = byte_level()
    text = TextProcessor(tokenizer, chat_template="{{ bos_token }}" + TEMPLATE)
    ids = text.encode_chat(user("hi"))
    assert text.decode(ids, skip_special_tokens=False) == "<|begin|><|user|>hi<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
    ],
)
def test_content_parts_equal_the_joined_string(content: Any, shown: str) -> None:
    text = TextProcessor(byte_level())
    assert text.render_chat(user(content), add_generation_prompt=False) == f"<|user|>{shown}<|end|>"


def test_a_template_that_wants_parts_gets_parts() -> None:
    template = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    text = TextProcessor(byte_level(), chat_template=template)
    assert text.render_chat(user("hi")) == "[hi]"
    assert TextProcessor(byte_level()).render_chat(user("hi")) == "<|user|>hi<|end|><|assistant|>"


def test_the_last_message_can_be_continued() -> None:
    text = TextProcessor(byte_level())
    messages = [*user("hi"), {"role": "assistant", "content": "Once upon"}]
    rendered = text.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered == "<|user|>hi<|end|><|assistant|>Once upon"
    with pytest.raises(RequestError, match="continue_final_message"):
        text.render_chat(messages, add_generation_prompt=True, continue_final_message=True)


def test_template_arguments_reach_the_template_but_cannot_replace_it() -> None:
    text = TextProcessor(byte_level(), chat_template="{{ mood }}{{ messages[0].content }}")
    assert text.render_chat(user("x"), chat_template_kwargs={"mood": "glad "}) == "glad x"
    with pytest.raises(RequestError, match="must not contain chat_template"):
        text.render_chat(user("x"), chat_template_kwargs={"chat_template": "{{ 1 }}"})


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="--chat-template"):
        TextProcessor(sentencepiece()).encode_chat(user("hi"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
        ("{% for %}", "Expected|expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_a_request_error_with_its_own_words(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TextProcessor(byte_level(), chat_template=template).render_chat(user("hi"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        ("hi", "at least one message"),
        ([123], r"messages\[0\] must be an object"),
        ([{}], r"messages\[0\].role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url.*text only"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input_audio.*text only"),
    ],
)
def test_broken_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TextProcessor(byte_level()).encode_chat(messages)


# --- stop strings ----------------------------------------------------------------------------------------------------


def stopped(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What the whole text comes to: the slow way, growing it by one character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(
    text=st.text("ab", max_size=14),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
    data=st.data(),
)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], include: bool, data: Any) -> None:
    expected, expected_stop = stopped(text, stops, include)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    finder, shown, matched = StopStrings(stops, include), "", None
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, matched = finder.push(text[start:end])
        shown += piece
        if matched is not None:
            break
        held = text[len(shown) : end]
        could_begin = [
            n for n in range(end + 1) if any(s.startswith(text[end - n : end]) and n < len(s) for s in stops)
        ]
        assert len(held) == max(could_begin), "exactly the longest suffix that begins a stop string is held"
    if matched is None:
        shown += finder.flush()
    assert (shown, matched) == (expected, expected_stop)


@pytest.mark.parametrize("split", range(1, 12))
def test_every_split_of_a_text_in_two_finds_the_stop_string(split: int) -> None:
    text = "before<stop>"
    finder = StopStrings(["<stop>"])
    first, matched = finder.push(text[:split])
    assert matched is None
    second, matched = finder.push(text[split:])
    assert (first + second, matched) == ("before", "<stop>")
