"""Studies together with other plugins, which are installed and real."""

from __future__ import annotations

import os
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import OTHER_PLUGINS, Results, WriteStudy
from tests.support import tavern
from tests.support.marks import slow
from tests.support.processes import gone, wait_until

ONCE = {"n_cycles": 1, "start_method": "forkserver"}

#: Options that make each plugin shuffle all tests with a seed.
SHUFFLERS = {
    "randomly": ["--randomly-seed={seed}"],
    "random_order": ["--random-order-bucket=global", "--random-order-seed={seed}"],
    "random_order modules": ["--random-order", "--random-order-seed={seed}"],
}


@pytest.fixture
def enable_plugins(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that enables some of the plugins that the fixture ``pytester`` disables."""

    def only(*names: str) -> None:
        assert {*names} <= {*OTHER_PLUGINS}
        blocked = [f"-p no:{name}" for name in OTHER_PLUGINS if name not in names]
        monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(blocked))

    return only


def outcomes(run: pytest.RunResult) -> dict[str, int]:
    """Return the number of tests by outcome, without warnings."""
    return {name: count for name, count in run.parseoutcomes().items() if not name.startswith("warning")}


class TestShuffling:
    @pytest.fixture(params=SHUFFLERS)
    def shuffled(
        self, request: pytest.FixtureRequest, enable_plugins: Callable[..., None]
    ) -> Callable[[int], list[str]]:
        """Return the options that make a plugin shuffle with a seed."""
        enable_plugins(request.param.split()[0])
        return lambda seed: [option.format(seed=seed) for option in SHUFFLERS[request.param]]

    @pytest.fixture
    def collected(self, pytester: pytest.Pytester) -> Callable[..., list[str]]:
        """Return the ids of a run's items, in order."""

        def collect(*arguments: str) -> list[str]:
            run = pytester.runpytest_inprocess("-p", "llem", "--collect-only", "-q", *arguments)
            assert run.ret == 0
            return [line for line in run.outlines if "::" in line]

        return collect

    def test_only_ordinary_tests_are_shuffled(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        enable_plugins: Callable[..., None],
        shuffled: Callable[[int], list[str]],
        collected: Callable[..., list[str]],
    ) -> None:
        for name in ("test_one", "test_two"):
            pytester.makepyfile(**{name: "\n".join(f"def test_{letter}(): pass" for letter in "abcdefgh")})
        studies = ["b.study.yaml", "a.study.yaml"]
        for name in studies:
            write_study(name)
        files = ["test_two.py", *studies, "test_one.py"]

        orders = [collected(*files, *shuffled(seed)) for seed in (1, 2)]
        enable_plugins()
        plain = collected(*files)
        assert len(plain) == 2 * 8 + 2 * 8

        def of(order: list[str], part: str) -> list[str]:
            return [one for one in order if part in one]

        for order in orders:
            assert sorted(order) == sorted(plain), "each test runs exactly once"
            for name in studies:
                assert of(order, name) == of(plain, name)
        ordinary = {tuple(of(order, "test_")) for order in (plain, *orders)}
        assert len(ordinary) == 3, "each seed gives another order of the ordinary tests"

    def test_a_shuffled_study_runs_in_its_own_order(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        shuffled: Callable[[int], list[str]],
    ) -> None:
        """Also if the plugin resets the random seed before each test."""
        write_study(sweep={"n": [1, 2]}, execution={**ONCE, "n_cycles": 2})
        pytester.makepyfile(test_plain="def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass")
        run = pytester.runpytest_inprocess("-v", "study.yaml", "test_plain.py", "-p", "llem", *shuffled(7))
        assert run.ret == 0
        assert outcomes(run) == {"passed": 7}
        entries = results.manifest["experiments"]
        assert {(entry["status"], entry["attempt"]) for entry in entries} == {("completed", 1)}
        ran = [line.partition(" ")[0] for line in run.outlines if " PASSED" in line and "experiment[" in line]
        assert ran == [f"study.yaml::experiment[{entry['experiment_id']}]" for entry in entries]
        started = [entry["started_at"] for entry in entries]
        assert started == sorted(started)

    @pytest.mark.slow
    def test_xdist_workers_agree_on_the_order(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        enable_plugins: Callable[..., None],
    ) -> None:
        enable_plugins("randomly")
        write_study(sweep={"n": [1, 2, 3]}, execution=ONCE)
        pytester.makepyfile(test_plain="def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass")
        run = pytester.runpytest_subprocess("study.yaml", "test_plain.py", "-p", "llem", "-n", "2")
        assert run.ret == 0
        assert outcomes(run) == {"passed": 6}
        assert set(results.statuses().values()) == {"completed"}


class TestReruns:
    @pytest.fixture(autouse=True)
    def _enable(self, enable_plugins: Callable[..., None]) -> None:
        enable_plugins("rerunfailures")

    @pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
    def test_an_experiment_that_fails_once_has_a_result(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        workers: tuple[str, ...],
    ) -> None:
        made = str(pytester.path / "made")
        # A failure before a rerun does not count.
        execution = {**ONCE, "cycle_order": "sequential", "max_consecutive_failures": 1}
        write_study(sweep={"n": [1, 2]}, noop={"fail_once": made}, execution=execution)
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--reruns", "1", *workers)
        assert run.ret == 0
        counted = outcomes(run)
        assert counted["passed"] == 2
        reruns = counted["rerun"]
        assert reruns == 1 if not workers else reruns in (1, 2), "two at once may both be the first"
        manifest = results.manifest
        assert (manifest["status"], manifest["completed"], manifest["failed"]) == ("completed", 2, 0)
        assert sum(entry["attempt"] for entry in manifest["experiments"]) == 2 + reruns
        for entry in manifest["experiments"]:
            assert entry["error"] is None
            assert (results.directory / entry["result_file"]).is_file()
        assert results.study_result["summary"]["failed"] == 0
        assert len(results.study_result["result_files"]) == 2
        run.stdout.fnmatch_lines(["2 of 2 experiments completed"])

    def test_an_experiment_that_always_fails_has_failed(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        write_study(sweep={"noop.fault": ["raise", "none"]}, execution=ONCE)
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--reruns", "2")
        assert run.ret == 1
        assert outcomes(run) == {"passed": 1, "failed": 1, "rerun": 2}
        assert results.manifest["status"] == "completed"
        attempts = {
            entry["experiment_id"]: (entry["status"], entry["attempt"])
            for entry in results.manifest["experiments"]
        }
        assert attempts == {"fault=raise": ("failed", 3), "fault=none": ("completed", 1)}
        run.stdout.fnmatch_lines(["1 of 2 experiments completed, 1 failed"])

    def test_result_of_a_rerun_replaces_the_first(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        """If only a fixture's teardown fails, the rerun's result replaces the first one."""
        write_study(sweep={"n": [1]}, execution=ONCE)
        pytester.makeconftest(
            """
            import pytest

            calls = []

            @pytest.fixture(autouse=True)
            def flaky():
                yield
                calls.append(1)
                assert len(calls) > 1
            """
        )
        options = ("--reruns", "1", "--junitxml=junit.xml")
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", *options)
        assert run.ret == 0
        assert outcomes(run)["rerun"] == 1
        (entry,) = results.manifest["experiments"]
        assert (entry["status"], entry["attempt"]) == ("completed", 2)
        assert len(list((results.directory / "experiments").glob("*.json"))) == 1
        cases = list(ET.parse(pytester.path / "junit.xml").iter("testcase"))
        assert len(cases) == 2, "pytest-rerunfailures reports each attempt"
        for case in cases:
            assert [one.get("name") for one in case.iter("property")].count("llem_seconds") == 1


class TestTimeouts:
    @pytest.fixture(autouse=True)
    def _enable(self, enable_plugins: Callable[..., None]) -> None:
        enable_plugins("timeout")

    @pytest.mark.parametrize("method", ["signal", slow("thread")])
    def test_timeout_that_is_not_reached_has_no_effect(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, method: str
    ) -> None:
        write_study(sweep={"n": [1]}, execution=ONCE)
        options = ("--timeout=300", f"--timeout-method={method}")
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", *options)
        assert outcomes(run) == {"passed": 1}
        assert results.manifest["status"] == "completed"

    @pytest.mark.slow
    def test_a_reached_timeout_fails_the_item_and_leaves_no_process(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        notes = pytester.path / "notes"
        notes.mkdir()
        write_study(
            sweep={"noop.fault": ["hang", "none"]},
            noop={"report": str(notes)},
            execution={**ONCE, "cycle_order": "sequential"},
        )
        pytester.makeconftest(
            """
            import json, pathlib, psutil

            def note():
                started = [json.loads(path.read_text())["pid"] for path in pathlib.Path("notes").iterdir()]
                alive = [pid for pid in started if psutil.pid_exists(pid)]
                with open("seen.txt", "a") as seen:
                    print(len(started), len(alive), file=seen)

            def pytest_runtest_teardown(item):
                if "hang" in item.name:  # the process of a completed experiment may end while the next one starts
                    note()

            def pytest_unconfigure(config):
                note()
            """
        )
        run = pytester.runpytest_subprocess(
            "study.yaml", "-p", "llem", "--timeout=6", "--timeout-method=signal", timeout=120
        )
        assert run.ret == 1
        assert outcomes(run) == {"failed": 1, "passed": 1}
        assert (pytester.path / "seen.txt").read_text() == "1 0\n2 0\n"
        assert results.statuses() == {"fault=hang": "failed", "fault=none": "completed"}
        error = results.manifest["experiments"][0]["error"]
        assert error["kind"] == "timeout"
        assert "Timeout (>6.0s)" in error["message"]
        assert results.manifest["status"] == "completed"

    @pytest.mark.slow
    def test_timeout_method_thread_ends_pytest_and_the_experiment(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        """The manifest, which is not finished, shows the experiment that was running."""
        (pytester.path / "notes").mkdir()
        write_study(
            sweep={"noop.fault": ["none", "hang"]},
            noop={"report": str(pytester.path / "notes")},
            execution={**ONCE, "cycle_order": "sequential"},
        )
        run = pytester.runpytest_subprocess(
            "study.yaml", "-p", "llem", "--timeout=10", "--timeout-method=thread", timeout=120
        )
        assert run.ret == 1
        wait_until(lambda: all(gone(int(note.stem)) for note in (pytester.path / "notes").iterdir()), 30)
        assert results.statuses() == {"fault=none": "completed", "fault=hang": "running"}
        assert results.manifest["status"] == "running"


@pytest.fixture(scope="session")
def tavern_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python interpreter with Tavern, which is incompatible with the pytest that runs these tests."""
    try:
        return tavern.python(tmp_path_factory.mktemp("tavern") / "env")
    except tavern.UnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"Tavern is not available: {error}")


@pytest.mark.slow
class TestTavern:
    @pytest.fixture
    def run(self, pytester: pytest.Pytester, tavern_python: Path) -> Callable[..., pytest.RunResult]:
        """Return a function that runs pytest with Tavern and returns its result."""
        return lambda *arguments: pytester.run(tavern_python, "-m", "pytest", "-p", "llem", *arguments)

    @pytest.fixture
    def asked(self, pytester: pytest.Pytester) -> Iterator[list[str]]:
        """Write a Tavern test that sends requests to a local server; return the list of the requested paths."""
        paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                body = b'{"answer": 42}'
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                """Log nothing."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stage = {
                "name": "ask",
                "request": {"url": f"http://127.0.0.1:{server.server_port}/question", "method": "GET"},
                "response": {"status_code": 200, "json": {"answer": 42}},
            }
            test = {"test_name": "it answers", "stages": [stage]}
            (pytester.path / "test_x.tavern.yaml").write_text(yaml.safe_dump(test))
            yield paths
            server.shutdown()
            thread.join()

    def test_each_yaml_file_is_collected_by_its_own_plugin(
        self,
        run: Callable[..., pytest.RunResult],
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        asked: list[str],
    ) -> None:
        write_study("y.study.yaml", sweep={"n": [1, 2]}, execution=ONCE)
        (pytester.path / "config.yaml").write_text("logging: {level: debug}\n")
        done = run("-v")
        assert outcomes(done) == {"passed": 3}
        assert asked == ["/question"]
        files = [line.partition("::")[0] for line in done.outlines if " PASSED" in line]
        assert sorted(files) == ["test_x.tavern.yaml", *["y.study.yaml"] * 2]
        assert results.manifest["status"] == "completed"

    @pytest.mark.parametrize("named", [True, False])
    def test_tavern_files_stay_with_tavern_for_any_llem_files(
        self,
        run: Callable[..., pytest.RunResult],
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        asked: list[str],
        named: bool,
    ) -> None:
        write_study("y.study.yaml", sweep={"n": [1]}, execution=ONCE)
        (pytester.path / "config.yaml").write_text("logging: {level: debug}\n")
        pytester.makeini("[pytest]\nllem_files = *.yaml")
        done = run(*(["test_x.tavern.yaml", "y.study.yaml"] if named else []))
        assert outcomes(done) == {"passed": 2}
        warned = [line for line in done.outlines if "config.yaml is not collected" in line]
        assert len(warned) == (0 if named else 1)
        assert "tavern.yaml is not collected" not in done.stdout.str()
        assert asked == ["/question"]
