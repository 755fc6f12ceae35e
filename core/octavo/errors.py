"""Every error that Octavo raises on purpose, by who can mend it."""

from __future__ import annotations


class OctavoError(Exception):
    """The base of all errors that are explained rather than unexpected."""


class ConfigError(OctavoError):
    """The configuration cannot work: whoever started the program can mend it."""


class PluginError(ConfigError):
    """A plugin cannot be found, imported, validated or combined; names the plugin and the option that leaves it out."""


class CheckpointError(ConfigError):
    """A model's files are missing, broken or of a kind that is not supported; names the file and the tensor."""


class RequestError(OctavoError):
    """One request cannot be served: the client can mend it.

    ``param`` names the offending field; ``status`` is the HTTP status that a server answers with.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class EngineDead(OctavoError):
    """The engine has stopped and serves nothing any more; the message carries the engine's own cause."""
