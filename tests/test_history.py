"""``llem history``: metrics over commits, their lasting changes, and the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_llem import StudyResult, cli
from pytest_llem.gates.history import History, history_of
from pytest_llem.gates.saving import save
from pytest_llem.gates.series import _FIRST_EPOCH, Series, _share, _sizes, find_changes
from pytest_llem.times import utc
from tests.conftest import ROOT
from tests.support.histories import commit_id, drift, results, three_changes, unchanged

OLD = ROOT / "tests" / "golden" / "1.4"

Llem = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def llem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Llem:
    """Run ``llem history`` at 80 columns in an empty folder, and return status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        status = cli.main(["history", *arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def write(folder: Path, found: Iterable[StudyResult]) -> None:
    """Write results to a folder, as CI appends them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(found):
        (folder / f"{one.name}_{number:03}.json").write_text(one.model_dump_json())


def places(history: History) -> set[tuple[str, str, int]]:
    """Return point, verdict and position of each change."""
    positions = {commit_id(at): at for at in range(200)}
    return {
        (one.point, change.verdict, positions[str(change.first.run.commit)])
        for one in history.series
        for change in one.changes
    }


class TestChanges:
    def test_planted_changes_are_found_at_their_commits_and_none_else(self) -> None:
        history = history_of(results(three_changes))
        wanted = {(f"batch_size={size}", *change) for size in (1, 2, 4, 8) for change in _OF_ALL_SIZES}
        wanted |= {(f"batch_size={size}", "REGRESSION", 160) for size in (4, 8)}
        assert len(history.series) == 12
        assert places(history) == wanted
        assert sum(len(one.changes) for one in history.series) == 3 * len(wanted)
        torch = [change for one in history.series for change in one.changes if change.facts]
        assert {(change.facts, change.first.run.commit) for change in torch} == {(("torch",), commit_id(110))}
        (first, *_) = history.series[0].changes
        assert first.change.interval[0] < math.exp(0.06) < first.change.interval[1]

    def test_nothing_is_found_without_a_change(self) -> None:
        assert not places(history_of(results(unchanged, seed=2)))

    def test_slow_drift_is_one_change(self) -> None:
        changed = [one for one in history_of(results(drift, seed=3)).series if one.changes]
        assert [one.point for one in changed] == ["batch_size=1"] * 3
        for one in changed:
            (change,) = one.changes
            assert change.change.is_drift
            assert change.change.last - change.change.first > 150
            assert abs(math.log(change.change.ratio)) == pytest.approx(0.1, abs=0.02)

    def test_shares_of_all_tests_add_up_to_at_most_one(self) -> None:
        """Otherwise reading a history after each commit would raise more false alarms than alpha."""
        runs = 40 * _FIRST_EPOCH
        pairs = [one + other for one, other in itertools.product(_sizes(runs), repeat=2)]
        total = sum(_share(end) for end in range(1, runs + 1) for pair in pairs if pair <= end)
        assert 0.5 < total < 1

    def test_mark_stays_when_runs_are_added(self) -> None:
        logs = np.random.default_rng(5).normal(0, 0.01, 120)
        logs[70:] += 0.2
        same = np.zeros(len(logs), dtype=bool)
        reads = [find_changes([Series(logs[:n], 0.02, same[:n])], 0.01)[0] for n in range(60, 120)]
        assert [len(one) for one in reads] == sorted(len(one) for one in reads)
        assert reads[-1][0].first == 70

    def test_single_outlier_is_no_change(self) -> None:
        logs = np.random.default_rng(6).normal(0, 0.01, 100)
        logs[50] += 0.5
        assert find_changes([Series(logs, 0.02, np.zeros(100, dtype=bool))], 0.01) == [[]]

    def test_constant_values_and_exact_step(self) -> None:
        logs = np.array([1.0] * 8 + [1.5] * 8)
        constant = Series(logs[:8], 0.0, np.zeros(8, dtype=bool))
        step = Series(logs, 0.02, np.zeros(16, dtype=bool))
        none, (one,) = find_changes([constant, step], 0.01)
        assert (none, one.first, round(one.ratio, 3)) == ([], 8, round(math.exp(0.5), 3))

    def test_runs_of_one_commit_do_not_differ(self) -> None:
        """A machine that changes between two runs of a commit is not blamed on it."""
        logs = np.array([1.0] * 8 + [1.5] * 8)
        same = np.zeros(16, dtype=bool)
        same[8] = True
        assert find_changes([Series(logs, 0.02, same)], 0.01) == [[]]


_OF_ALL_SIZES = (("REGRESSION", 60), ("IMPROVEMENT", 110))


def _of(effect: Callable[[int, int], float] = unchanged, commits: int = 12, **fields: Any) -> list[StudyResult]:
    return list(results(effect, commits, **fields))


class TestRuns:
    def test_testbeds_are_never_mixed(self) -> None:
        found = _of(lambda at, _: 0.3 * (at % 2))
        for one in found[1::2]:
            for point in one.points:
                point.testbed = point.testbed | {"power_limit": "400 W"}
        history = history_of(found)
        assert {(len(one.values), one.testbed) for one in history.series} == {
            (6, "nvidia-h100-80gb-hbm3_700-w_amd-epyc-9654"),
            (6, "nvidia-h100-80gb-hbm3_400-w_amd-epyc-9654"),
        }
        assert not places(history)

    def test_changed_dataset_begins_a_series_of_its_own(self) -> None:
        found = _of(lambda at, _: 0.3 * (at >= 6))
        for one in found[6:]:
            for point in one.points:
                point.testbed = point.testbed | {"dataset_hash": "e" * 64}
        history = history_of(found)
        assert not places(history)
        assert [one.differs for one in history.series[:2]] == [
            None,
            "dataset hash: eeeeeeeeeeee",
        ]

    def test_unknown_optional_fact_does_not_separate(self) -> None:
        found = _of()
        for one in found[:6]:
            for point in one.points:
                point.testbed = {key: value for key, value in point.testbed.items() if key != "power_limit"}
        assert {len(one.values) for one in history_of(found).series} == {12}

    def test_copies_and_replayed_runs_count_once(self) -> None:
        found = _of()
        replay = found[3].model_copy(update={"started_at": "2026-09-01T00:00:00.000Z"})
        history = history_of([*found, found[5].model_copy(), replay])
        assert (history.copies, len(history.series[0].values)) == (1, 12)

    def test_contended_and_estimated_runs_are_not_judged(self) -> None:
        found = _of()
        for one in found[:3]:
            for metric in one.points[0].metrics.values():
                metric.not_judged = "too few requests"
        for one in found:
            one.points[1].metrics["energy_per_output_token_j"].method = "estimated"
        series = history_of(found).series
        assert [len(one.judged) for one in series[:4]] == [9, 9, 9, 0]
        assert series[3].not_judged_reason is not None
        assert series[3].not_judged_reason.startswith("needs 6 runs, has 0: energy is estimated, not measured")

    def test_order_is_that_of_commits_if_all_are_known(self) -> None:
        found = _of(commits=6)
        late = found[0].model_copy(update={"started_at": "2027-01-01T00:00:00.000Z"})
        reread = [*found[1:], late]
        times = {commit_id(at): (utc(1e9 + at), f"subject {at}") for at in range(6)}
        assert [run.commit for run in history_of(reread).runs] == [commit_id(at) for at in (1, 2, 3, 4, 5, 0)]
        history = history_of(reread, commits_of=lambda _: times)
        assert [run.commit for run in history.runs] == [commit_id(at) for at in range(6)]
        assert history.runs[0].subject == "subject 0"

    def test_results_without_a_commit_and_of_a_changed_tree(self) -> None:
        without = _of(commits=1, environment={})
        for point in without[0].points:
            del point.sut["commit"]
        dirty = _of(commits=1, seed=4, environment={"git": {"commit": "a" * 40, "dirty": True}})
        dirty[0].started_at = "2026-02-02T00:00:00.000Z"
        assert [run.label for run in history_of([*without, *dirty]).runs] == ["–", "aaaaaaaaaa+"]


class TestCommand:
    def test_changes_are_shown_at_80_columns(self, llem: Llem, tmp_path: Path) -> None:
        write(tmp_path / "history", results(three_changes, 100))
        status, out, err = llem("history", "--metric", "ttft_p50_ms")
        assert (status, err) == (0, [])
        assert max(map(len, out)) <= 80
        assert out[0] == "llama: 100 runs of 100 commits, 2026-01-01 to 2026-03-24"
        assert out[1] == "testbed nvidia-h100-80gb-hbm3_700-w_amd-epyc-9654"
        assert sum(f"REGRESSION at {commit_id(60)[:10]} 2026-02-20" in line for line in out) == 4
        assert f"{commit_id(60)[:10]} 2026-02-20: 4 REGRESSION" in out

    def test_baselines_results_directories_and_old_schemas_are_read(self, llem: Llem, tmp_path: Path) -> None:
        save(_of(commits=1)[0], "main", tmp_path / "baselines")
        status, out, err = llem(
            "baselines", str(ROOT / "docs" / "example"), str(OLD), "--metric", "seconds", "--metric", "ttft_p50_ms"
        )
        assert (status, err) == (0, [])
        assert [line.partition(",")[0] for line in out if "run of" in line] == [
            "llama: 1 run of 1 commit",
            "full: 1 run of 0 commits",
            "llama-1b-shape: 1 run of 0 commits",
        ]

    def test_single_result_is_not_judged(self, llem: Llem, tmp_path: Path) -> None:
        write(tmp_path / "one", results(unchanged, 1))
        status, out, _ = llem("one")
        assert status == 0
        assert sum("not judged" in line for line in out) == 13
        assert out.count("not judged: needs 6 runs, has 1 (12 series)") == 1
        assert out[0] == "llama: 1 run of 1 commit, 2026-01-01"

    def test_unreadable_files_are_named_and_left_out(self, llem: Llem, tmp_path: Path) -> None:
        write(tmp_path / "all", results(unchanged, 7))
        (tmp_path / "all" / "corrupt.json").write_text("<<<<<<< HEAD")
        (tmp_path / "all" / "future.json").write_text('{"schema_version": "9.0"}')
        status, _, err = llem("all")
        assert status == 0
        assert [line.partition(": ")[2].partition("json")[0] for line in err] == [
            "left out: all/corrupt.",
            "left out: all/future.",
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "llem: nowhere: no such file or folder"),
            (["empty"], "llem: empty: holds no results"),
            (["empty", "-o", "empty"], "llem: must be a file (got 'empty')"),
            (["empty", "-o", "study.yaml"], "llem: exists with other content and is not overwritten *"),
        ],
    )
    def test_mistakes_are_one_line(self, llem: Llem, tmp_path: Path, arguments: list[str], message: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "study.yaml").write_text("name: a\n")
        status, out, err = llem(*arguments)
        assert (status, out, len(err)) == (2, [], 1)
        assert err[0].startswith(message.rstrip("*"))

    def test_page_has_every_series_and_change(self, llem: Llem, tmp_path: Path) -> None:
        found = _of(lambda at, _: 0.3 * (at >= 20), 40)
        found[20].environment["git"]["commit"] = "<script>alert(1)</script>"
        write(tmp_path / "history", found)
        status, out, _ = llem("history", "-o", "page/history.html")
        page = (tmp_path / "page" / "history.html").read_text()
        assert (status, out[-1]) == (0, "page/history.html")
        assert page.count("<td>&lt;script&gt;") == 12
        assert "<script>alert" not in page
        assert page.count('<span class="badge bad">REGRESSION</span>') == 12
        assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_shares_of_doublings() -> None:
    def doublings() -> Iterator[float]:
        for end in (8, 16, 32):
            yield _share(end)

    assert list(doublings()) == sorted(doublings(), reverse=True)
