"""Sampling options on the command line: the fields of :class:`~octavo.request.SamplingParams` that one types."""

from __future__ import annotations

import argparse
from typing import Any

from octavo.request import SamplingParams

OPTIONS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens to generate at most"),
    "temperature": (float, "0: always the most likely token; higher: more varied"),
    "top_p": (float, "only the most likely tokens whose probabilities add up to this"),
    "top_k": (int, "only this many of the most likely tokens; 0: all"),
    "min_p": (float, "only tokens at least this share as likely as the most likely one"),
    "repetition_penalty": (float, "above 1: tokens that occurred become less likely"),
    "presence_penalty": (float, "subtracted from the logits of tokens that were generated"),
    "frequency_penalty": (float, "the same, times how often they were generated"),
}


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the options; ``max_tokens`` is this command's own default, the others have SamplingParams' own."""
    group = parser.add_argument_group("sampling")
    plain = SamplingParams(max_tokens=max_tokens)
    for name, (kind, words) in OPTIONS.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=getattr(plain, name),
            metavar="N" if kind is int else "X",
            help=f"{words} (default: %(default)s)",
        )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )


def sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """The parameters that the options describe.

    Raises:
        RequestError: a value is out of range.
    """
    return SamplingParams(**{name: getattr(args, name) for name in OPTIONS}, stop=args.stop, **more)


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The same as fields of an OpenAI request: only what differs from a server's own defaults, since not every server
    knows every field."""
    params = sampling_params(args)
    plain = SamplingParams()
    fields = {name: getattr(params, name) for name in OPTIONS if getattr(params, name) != getattr(plain, name)}
    return fields | ({"stop": args.stop} if args.stop else {})
