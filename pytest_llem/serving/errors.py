"""Errors that end a load. Each message is one line: what happened, the values, and what to do."""

from __future__ import annotations


class LoadError(Exception):
    """Base of all errors that end a load.

    Attributes:
        phase: The phase to report if the error is raised in a later one; else None.

    Example:
        >>> raise NotSteadyError("8.0 requests/s were offered and 5.1 were served: lower load.rate")
    """

    phase: str | None = None


class ServerGoneError(LoadError):
    """Raised if the server refuses connections, or its process has ended."""


class TooManyErrors(LoadError):  # noqa: N818 (an error about errors)
    """Raised if a larger share of the requests failed than ``load.max_error_rate``."""


class NotSteadyError(LoadError):
    """Raised if an open loop offers more than the server serves, so that the requests in flight grow."""


class ClientBoundError(LoadError):
    """Raised if this client was too slow for the load. Its own speed must not be reported as the server's."""

    phase = "measuring"  # the lags of all requests are known after the drain


class DatasetExhaustedError(LoadError):
    """Raised if the load needs more prompts or arrivals than there are."""
