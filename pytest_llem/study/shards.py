"""Divide a study into shards, each of which is run on its own, on any machine, and merged afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llem.study.design import Experiment, StudyConfig


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a study.

    Attributes:
        number: Number of the shard, from 1.
        count: Number of shards.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that *text* names, such as ``2/8``.

        Raises:
            ValueError: *text* is not ``I/N`` with 1 ≤ I ≤ N.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"must be I/N, the shard's number from 1 and the number of shards (got {text!r})")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def points(self, study: StudyConfig) -> set[str]:
        """Return the ids of the shard's points.

        They follow from the study alone, whatever is selected, so they are the same on every machine. All cycles
        of a point are in one shard, so that they run on one machine; so are points that share a server.

        Example:
            >>> Shard(1, 2).points(study)  # the first, third, … point
        """
        groups: dict[object, list[str]] = {}
        for point, group in zip(study.points, study.server_groups, strict=True):
            groups.setdefault(group, []).append(point.id)
        shards: list[set[str]] = [set() for _ in range(self.count)]
        for names in sorted(groups.values(), key=len, reverse=True):  # the largest first, for shards of equal size
            min(shards, key=len).update(names)
        return shards[self.number - 1]

    def experiments(self, study: StudyConfig) -> list[Experiment]:
        """Return the shard's experiments, in run order."""
        points = self.points(study)
        return [experiment for experiment in study.experiments if experiment.point.id in points]
