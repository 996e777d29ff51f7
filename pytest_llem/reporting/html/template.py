"""Make an HTML document of a template and plots, which loads nothing over the network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pytest_llem.reporting.html.labels import axes_data
from pytest_llem.reporting.html.plots import Plot
from pytest_llem.reporting.text import pieces
from pytest_llem.results.points import PointResult


def render_template(
    template: str, name: str, plots: Iterable[Plot], content: Mapping[str, Any], points: Sequence[PointResult] = ()
) -> str:
    """Return a page, whose policy allows only its own scripts.

    Args:
        template: File name of the template.
        name: Beginning of the names of files that plots are saved as.
        plots: The plots that the page's script draws.
        content: What else the template shows.
        points: The points, by whose axes marks may be coloured.
    """
    environment = Environment(
        loader=PackageLoader("pytest_llem.reporting.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly, script = get_plotlyjs(), _file("layout.js") + _file("report.js")
    data = {"name": name, "axes": axes_data(points), "plots": {plot.key: plot.data() for plot in plots}}
    return environment.get_template(template).render(
        **content,
        breakable=_breakable,
        # The template does not escape these: as_json() makes the data safe, and the rest comes with packages.
        data=as_json(data),
        plotly=plotly,
        script=script,
        style=_file("report.css"),
        policy=_policy(plotly, script),
    )


def as_json(data: Any) -> str:
    """Return *data* as JSON that is safe inside a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _breakable(text: str) -> Markup:
    """Return *text* as HTML that is broken between its words only."""
    return Markup("<wbr>").join(pieces(text))


def _policy(*scripts: str) -> str:
    """Return a Content-Security-Policy that allows only these scripts and no network requests."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return files("pytest_llem.reporting.html").joinpath("templates", name).read_text(encoding="utf-8")
