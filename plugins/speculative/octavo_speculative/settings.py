"""What a user can set beside the core's speculation options."""

from __future__ import annotations

from dataclasses import dataclass

from octavo import ConfigError, EngineConfig

MAX_NGRAM = 16


@dataclass(frozen=True, slots=True)
class NgramSettings:
    """How many tokens at the end of a sequence must have occurred before; the longest that did decide.

    Raises:
        ConfigError: the bounds are out of order or out of range.
    """

    shortest: int = 2
    longest: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest <= MAX_NGRAM:
            raise ConfigError(
                f"--speculative-ngram-min {self.shortest} and --speculative-ngram-max {self.longest}: they must be in "
                f"this order and between 1 and {MAX_NGRAM}"
            )

    @classmethod
    def of(cls, config: EngineConfig) -> NgramSettings:
        """The settings in a configuration, where an option that is absent has its default."""
        options = config.plugin_options
        return cls(
            options.get("speculative_ngram_min", cls().shortest), options.get("speculative_ngram_max", cls().longest)
        )
