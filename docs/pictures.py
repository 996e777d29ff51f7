"""Make the pictures of README.md from a real run: ``python docs/pictures.py``.

It runs ``studies/quickstart.yaml`` in a terminal of 80 columns and writes ``docs/_static/terminal.svg`` from its
output and ``docs/_static/report.png`` from its report. It needs the extra ``test`` and Chromium.
"""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from fcntl import ioctl
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.browser import browser  # noqa: E402 - found by the path above

STATIC = ROOT / "docs" / "_static"
STUDY = "studies/quickstart.yaml"
ARGUMENTS = (STUDY, "-p", "llem", "--llem-html", "report.html")
COLUMNS = 80

#: What the line of live progress writes: it makes room below the cursor, writes there, and returns.
_LIVE = re.compile(r"\x1bD\x1bM|\x1b7.*?\x1b8", re.DOTALL)

#: Plugins of the test environment that a new installation does not have.
_OTHER_PLUGINS = ("randomly", "random_order", "rerunfailures", "timeout", "hypothesispytest", "anyio")


def run(folder: Path) -> str:
    """Run the study in *folder*, with its report ``report.html``, and return what the terminal received."""
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    hidden = ("COLUMNS", "LINES", "CI", "NO_COLOR", "PYTEST_ADDOPTS")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "pytest", *ARGUMENTS, *(f"-pno:{name}" for name in _OTHER_PLUGINS)]
    (folder / STUDY).parent.mkdir()
    (folder / STUDY).write_bytes((ROOT / STUDY).read_bytes())
    received = bytearray()
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**env, "TERM": "xterm-256color"},
    ) as process:
        os.close(terminal)
        while True:
            try:
                received += os.read(controller, 1 << 16)
            except OSError:  # the program has closed the terminal
                break
    os.close(controller)
    if process.returncode:
        raise SystemExit(f"the study exits with {process.returncode}:\n{received.decode()}")
    return received.decode()


def terminal_svg(output: str) -> str:
    """Return a picture of a terminal that shows *output*, without the line that has a path of this machine."""
    text = _LIVE.sub("", output).replace("\r\n", "\n")
    written = (line.rpartition("\r")[2] for line in text.split("\n"))  # "collected" overwrites "collecting"
    lines = [line for line in written if not line.startswith("rootdir: ")]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="256")
    console.print(Text(f"$ pytest {' '.join(ARGUMENTS)}", style="bold"))
    console.print(Text.from_ansi("\n".join(lines)))
    return console.export_svg(title="pytest-llem", theme=MONOKAI, unique_id="llem")


def report_png(report: Path, picture: Path) -> None:
    """Write the first screen of a report as a PNG."""
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1100, "height": 1250}, color_scheme="light")
        page.goto(report.as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        page.screenshot(path=picture)


def main() -> None:
    """Run the study, and write both pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = run(folder)
        (STATIC / "terminal.svg").write_text(terminal_svg(output), encoding="utf-8")
        report_png(folder / "report.html", STATIC / "report.png")


if __name__ == "__main__":
    main()
