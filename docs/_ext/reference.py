"""Write the reference pages from the package: one source for a name, its type, unit, default, range and meaning.

Sphinx calls :func:`setup`. Pages go to ``docs/_generated``, and the pages in ``docs/reference`` include them.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from sphinx.application import Sphinx

from pytest_llem._plugin import declarations
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.doctor.records import Examination
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.models import Manifest, StudyResult
from pytest_llem.results.quality_warnings import WARNINGS
from pytest_llem.results.tabular import column
from pytest_llem.study.schema import study_schema

OUTPUT = Path(__file__).parent.parent / "_generated"


def setup(app: Sphinx) -> dict[str, Any]:
    """Generate the pages before Sphinx looks for them."""
    app.connect("builder-inited", lambda _: generate(OUTPUT))
    return {"parallel_read_safe": True}


def generate(folder: Path) -> None:
    """Write every page below *folder*; a page that is unchanged is left alone, so that builds stay incremental."""
    folder.mkdir(exist_ok=True)
    pages = {
        "study": study(),
        "options": options(),
        "ini": ini(),
        "metrics": metrics(),
        "warnings": warnings(),
        "experiment-result": records(ExperimentResult),
        "study-result": records(StudyResult, without=ExperimentResult),
        "manifest": records(Manifest, without=StudyResult),
        "doctor": records(Examination),
    }
    for name, lines in pages.items():
        text = "\n".join(lines) + "\n"
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield a Markdown table."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') or '–' for cell in row)} |"
    yield ""


def code(value: Any) -> str:
    """Return *value* as code, as a study or JSON has it."""
    return f"`{value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)}`"


def prose(text: str | None) -> str:
    """Return a docstring's text as Markdown, on one line."""
    return " ".join((text or "").replace("``", "`").split())


# ---- studies ----


def study() -> Iterator[str]:
    """Yield every field of a study: a heading, its type, default and range, and what it means."""
    schema = study_schema(installed(ENGINE_GROUP))
    definitions = schema["$defs"]
    fields = schema["properties"]
    yield from _fields(fields, definitions, "", 2)


def _fields(fields: dict[str, Any], definitions: dict[str, Any], prefix: str, level: int) -> Iterator[str]:
    for name, given in fields.items():
        path = f"{prefix}{name}"
        field = _resolved(given, definitions)
        description = given.get("description") or field.get("description", "")
        yield f"({path})=" if "." in path else f"{{#{path}}}"  # an attribute of MyST has no dot
        yield f"{'#' * level} `{path}`"
        yield ""
        yield from _facts(field, definitions)
        yield prose(description)
        yield ""
        if (inner := _inner(field, definitions)) and path not in ("sweep", "experiments", "budgets"):
            yield from _fields(inner, definitions, f"{path}.", min(level + 1, 4))


def _resolved(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in field:
        *_, name = field["$ref"].split("/$defs/")
        found: Any = definitions
        for part in name.split("/"):
            found = found[part]
        field = {**found, **{key: one for key, one in field.items() if key != "$ref"}}
    return field


def _kinds(field: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    return [_resolved(kind, definitions) for kind in field.get("anyOf", [field])]


def _inner(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return next((kind["properties"] for kind in _kinds(field, definitions) if kind.get("properties")), {})


def _facts(field: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    kinds = [kind for kind in map(_kind, _kinds(field, definitions)) if kind]
    facts = [" or ".join(dict.fromkeys(kinds))] if kinds else []
    if "default" in field:
        facts.append(f"default {code(field['default'])}")
    if facts:
        yield f"*{', '.join(facts)}*"
        yield ""


def _kind(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(map(code, kind["enum"]))
    if "const" in kind:
        return code(kind["const"])
    bounds = [
        (f"{words} {kind[key]:,}")
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "less than"),
        )
        if key in kind
    ]
    names = {"object": "mapping", "array": "list", "string": "text", "boolean": "true or false"}
    kinds = kind.get("type", "")
    name = names.get(kinds, kinds) if isinstance(kinds, str) else " or ".join(kinds)
    return f"{name} ({', '.join(bounds)})" if bounds else name


# ---- options ----


class _Options:
    """Stands for pytest's parser, and keeps what is declared."""

    def __init__(self) -> None:
        self.options: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        self.inis: list[tuple[str, dict[str, Any]]] = []

    def getgroup(self, *_: str) -> _Options:
        return self

    def addoption(self, *names: str, **given: Any) -> None:
        self.options.append((names, given))

    def addini(self, name: str, help: str, **given: Any) -> None:
        self.inis.append((name, {"help": help, **given}))


def options() -> Iterator[str]:
    """Yield every option of pytest that is ours."""
    parser = _Options()
    declarations.add_options(parser)  # type: ignore[arg-type]
    for names, given in parser.options:
        name = names[-1]
        value = given.get("metavar") or "|".join(given.get("choices") or ())
        yield f"{{#{name.removeprefix('--')}}}"
        yield f"## `{f'{name}={value}' if value else name}`"
        yield ""
        yield prose(given["help"])
        yield ""


def ini() -> Iterator[str]:
    """Yield every key of the ini file."""
    kinds = {"string": "text", "bool": "true or false", "paths": "paths", "args": "words"}
    rows = (
        (f"`{name}`", kinds[kind], code(default), prose(text))
        for name, (kind, default, text) in declarations.INI.items()
    )
    yield from table(("key", "type", "default", "meaning"), rows)


# ---- metrics and warnings ----


def metrics() -> Iterator[str]:
    """Yield the catalogue of metrics."""
    for name, one in CATALOGUE.items():
        better = {"lower": "lower is better", "higher": "higher is better", None: "not gated by comparisons"}[
            one.better
        ]
        yield f"{{#{name}}}"
        yield f"## `{name}`"
        yield ""
        yield f"*{one.unit}, {better}, CSV column `{column(name)}`*"
        yield ""
        yield prose(one.meaning)
        yield ""


def warnings() -> Iterator[str]:
    """Yield every code of a quality warning, the worst first."""
    rows = ((f"[]{{#{code_}}}`{code_}`", one.severity, prose(one.meaning)) for code_, one in WARNINGS.items())
    yield from table(("code", "severity", "meaning"), rows)


# ---- files ----


def records(document: type[BaseModel], without: type[BaseModel] | None = None) -> Iterator[str]:
    """Yield a table of the keys of *document*, and of each record in it.

    Args:
        document: The file's model.
        without: Records that are in this one are left out: another page has them.
    """
    known = set(_models(without)) if without is not None else set()
    for model in _models(document):
        if model in known:
            continue
        yield f"## {model.__name__}"
        yield ""
        yield prose((model.__doc__ or "").partition("\n\n")[0])
        yield ""
        rows = (
            (f"`{name}`", _type(field.annotation), prose(field.description))
            for name, field in model.model_fields.items()
        )
        yield from table(("key", "type", "meaning"), rows)


def _models(document: type[BaseModel]) -> list[type[BaseModel]]:
    """Return *document* and the models that it holds, each once, in the order in which they come up."""
    found: dict[type[BaseModel], None] = {}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation in found:
                return
            found[annotation] = None
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for inner in get_args(annotation):
            visit(inner)

    visit(document)
    return list(found)


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "any"
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return ", ".join(code(one) for one in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, inner)))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)} {_type(inner[0])}"
    if origin is dict:
        return f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "dict": "mapping"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, f"[{name}](#{name.lower()})")
