"""Compare the greedy outputs of several engines, to show whether they did the same work."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pytest_llem.results.csv_files import read_csv
from pytest_llem.results.document import Record
from pytest_llem.results.experiment import ExperimentResult

#: Suffix of the file of output token ids, beside a result.
OUTPUTS = "outputs.csv"


class TokenAgreement(Record):
    """How far the greedy outputs of two engines agree for the same prompts, model and settings."""

    point: str
    """Id of a point."""
    reference: str
    """Id of the point of the study's first engine that it is compared with."""
    share: float
    """Tokens before the first difference of each request ÷ ``tokens``, 0 to 1."""
    requests: int
    """Number of compared requests, of the first pass of the first cycle."""
    tokens: int
    """Number of output tokens of these requests; of the two outputs of a request, the longer one counts."""


class GreedyOutputs:
    """Collects points of a study whose greedy outputs can be compared: only their engines differ.

    Args:
        directory: The study's results directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        #: The first point of each engine and its result file, by prompts and settings.
        self._points: dict[tuple[object, ...], dict[str, tuple[str, str]]] = {}

    def add(self, result: ExperimentResult, point: str, result_file: str) -> None:
        """Add the first cycle of *point*, unless it samples.

        Of several points of one engine with the same prompts and settings, only the first is added.
        """
        config = result.effective_config
        decoder = config["decoder"]
        if decoder is None or (decoder["do_sample"] and decoder["temperature"] != 0):
            return
        key = (
            *(config[name] for name in ("model", "precision", "prompt_format", "max_output_tokens")),
            *(repr(decoder), config["measurement"]["length_mode"], result.tokens.dataset_hash),
        )
        self._points.setdefault(key, {}).setdefault(config["backend"], (point, result_file))

    def agreements(self) -> Iterator[TokenAgreement]:
        """Yield the agreement of each engine's outputs with those of the first engine."""
        for by_engine in self._points.values():
            (reference, file), *others = by_engine.values()
            for point, other in others:
                first, second = self._read(file), self._read(other)
                pairs = [(ids, second[name]) for name, ids in first.items() if name in second]
                tokens = sum(max(len(a), len(b)) for a, b in pairs)
                if tokens:
                    equal = sum(_common_prefix(a, b) for a, b in pairs)
                    yield TokenAgreement(
                        point=point, reference=reference, share=equal / tokens, requests=len(pairs), tokens=tokens
                    )

    def _read(self, result_file: str) -> dict[str, list[str]]:
        """Return the output token ids of each request of the first pass; empty if they were not saved."""
        file = (self._directory / result_file).with_suffix(f".{OUTPUTS}")
        found: dict[str, list[str]] = {}
        unreadable = suppress(OSError, ValueError, KeyError, TypeError, csv.Error)
        with unreadable, file.open(encoding="utf-8", newline="") as lines:
            for row in read_csv(lines):
                if row["output_ids"]:
                    found[row["request"]] = row["output_ids"].split()
        return found


def _common_prefix(a: list[str], b: list[str]) -> int:
    """Return the number of equal tokens before the first that differs: all later ones follow from it."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(a), len(b)))
