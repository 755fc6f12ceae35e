"""Drafts by a small model with the target's vocabulary (Leviathan et al. 2023, Chen et al. 2023), decoding greedily."""

from __future__ import annotations

from octavo import ConfigError, EngineConfig
from octavo.interfaces import Checkpoint, DrafterContext
from octavo_speculative.beside import DrafterBeside


class DraftModel(DrafterBeside):
    """The drafter ``draft-model``; see :class:`octavo.interfaces.Drafter`."""

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        """Loads the weights.

        Raises:
            ConfigError: the model cannot be served, or has another vocabulary than the target.
        """
        speculative = config.speculative
        if speculative.model is None:
            raise ConfigError("speculation by draft-model needs a model; name one with --speculative-model")
        model = context.load_model(speculative.model, dtype=speculative.dtype, quantization=speculative.quantization)
        if config.load_format == "dummy":
            check_sizes(context.vocab_size, model.vocab_size)
        else:
            check_vocabulary(context.checkpoint, model.checkpoint)
        # the last draft of an accepted row was not read yet when the token after it is known: two are new at most
        super().__init__(model, context, vocab_size=min(context.vocab_size, model.vocab_size), max_row_tokens=2)


def check_vocabulary(target: Checkpoint, draft: Checkpoint) -> None:
    """Both models must give every token the same id.

    Raises:
        ConfigError: names a token that differs.
    """
    ours, theirs = target.tokenizer().get_vocab(), draft.tokenizer().get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    example = differing[0]
    raise ConfigError(
        f"the draft model {draft.path} has another vocabulary than {target.path}: {len(differing)} tokens differ, such "
        f"as {example!r} with the id {theirs.get(example, 'none')} instead of {ours.get(example, 'none')}; use a draft "
        f"model of the same family, or --speculative-method ngram, which needs none"
    )


def check_sizes(target: int, draft: int) -> None:
    """Without weights there need be no tokenizer, so only the sizes can be compared.

    Raises:
        ConfigError: the sizes differ.
    """
    if target != draft:
        raise ConfigError(f"the draft model's vocabulary has {draft} tokens, but the target's has {target}")
