"""A tokenizer from a GGUF file's metadata (``tokenizer.ggml.*``).

The file names its pre-tokenizer; it must be honoured, or numbers and runs of spaces are cut differently from what the
model was trained on while plain prose still looks right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo.errors import CheckpointError
from octavo_gguf.metadata import Metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # token types that are not plain vocabulary
METASPACE = "\u2581"

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before byte-pair merges, and what else goes with that family of tokenizers."""

    make: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False  # a whole word that is in the vocabulary is taken without asking the merges
    add_bos: bool = False  # when the file does not say


def _bytes_after(first: Any) -> Any:
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = PreTokenizer(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
SMOLLM = PreTokenizer(
    lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
)
LLAMA3 = PreTokenizer(
    lambda: _bytes_after(pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")), ignore_merges=True, add_bos=True
)
QWEN2 = PreTokenizer(
    lambda: _bytes_after(pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")), normalizer=normalizers.NFC
)
PRE_TOKENIZERS = {
    "deepseek-r1-qwen": QWEN2,
    "default": GPT2,
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "smollm": SMOLLM,
}


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes, with its chat template.

    Raises:
        CheckpointError: a part is missing, or of a kind that is not known; names the known ones.
    """
    from transformers import PreTrainedTokenizerFast

    path = metadata.path
    kind = metadata.text("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise CheckpointError(
            f"{path} has a tokenizer of the kind '{kind}'; known: {', '.join(builders)}. Name another with --tokenizer"
        )
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{path} holds no tokenizer.ggml.tokens; name a tokenizer with --tokenizer")
    stored_types = metadata.numbers("tokenizer.ggml.token_type")
    types: list[int] = [] if stored_types is None else stored_types.tolist()
    tokenizer, add_bos = builders[kind](metadata, tokens, types)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=bool(kind_of_token == CONTROL))
            for token, kind_of_token in zip(tokens, types, strict=False)
            if kind_of_token in (CONTROL, USER_DEFINED)
        ]
    )
    names = {
        role: tokens[token_id]
        for role in ("bos", "eos", "unknown", "padding")
        if (token_id := metadata.integer(f"tokenizer.ggml.{role}_token_id")) is not None and token_id < len(tokens)
    }
    said = metadata.flag("tokenizer.ggml.add_bos_token")
    begin = [names["bos"]] if (add_bos if said is None else said) and "bos" in names else []
    end = [names["eos"]] if metadata.flag("tokenizer.ggml.add_eos_token") and "eos" in names else []
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B", *end],
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys([*begin, *end])],
        )
    special = {
        f"{short}_token": names[role]
        for role, short in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
        if role in names
    }
    fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.text("tokenizer.chat_template"),
        **special,
    )
    return fast


def _byte_level(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    """Byte-pair merges over GPT-2's byte alphabet."""
    name = metadata.text("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{metadata.path} cuts text with the pre-tokenizer '{name}', which is not known; known: "
            f"{', '.join(PRE_TOKENIZERS)}. Name the model's original tokenizer with --tokenizer"
        )
    family = PRE_TOKENIZERS[name]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges") or ():
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CheckpointError(
                f"{metadata.path} merges '{left}' and '{right}' (tokenizer.ggml.merges), which are not tokens "
                f"that make a third; name the model's original tokenizer with --tokenizer"
            )
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=family.ignore_merges))
    if family.normalizer is not None:
        tokenizer.normalizer = family.normalizer()
    tokenizer.pre_tokenizer = family.make()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, family.add_bos


def _sentencepiece(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: the best-scored adjacent pair is merged first; unknown characters become bytes."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(
            f"{metadata.path} does not hold one of tokenizer.ggml.scores for each of {len(tokens)} tokens"
        )
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges_from_scores(vocabulary, [float(score) for score in scores], types)
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id") or 0
    if unknown >= len(tokens):
        raise CheckpointError(
            f"{metadata.path} has {len(tokens)} tokens and no tokenizer.ggml.unknown_token_id {unknown}"
        )
    model = models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types)
    tokenizer = Tokenizer(model)
    add_space = metadata.flag("tokenizer.ggml.add_space_prefix") is not False
    spaces = [normalizers.Prepend(METASPACE)] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", METASPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _merges_from_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two entries into a third, best score of the whole first."""
    found = []
    for token, token_id in vocabulary.items():
        if token_id < len(types) and types[token_id] in (CONTROL, BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[token_id], token_id, left, right, token[:cut], token[cut:]))
    found.sort(key=lambda merge: merge[:4])
    return [(merge[4], merge[5]) for merge in found]
