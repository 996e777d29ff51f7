"""Write the reference pages from the package: one source for a name, its type, unit, default, range and meaning.

Sphinx calls :func:`setup`. Pages go to ``docs/_generated``, and the pages in ``docs/reference`` include them.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from pytest_llem._plugin import declarations
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.doctor.records import Examination
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.reporting.html import write_report
from pytest_llem.results.environment import VARIABLES
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import Manifest
from pytest_llem.results.quality_warnings import WARNINGS
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.budgets import BudgetConfig
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.execution import ExecutionConfig, Rule
from pytest_llem.study.gates import GatesConfig
from pytest_llem.study.schema import field_docstrings, study_schema

if TYPE_CHECKING:
    from sphinx.application import Sphinx

OUTPUT = Path(__file__).parent.parent / "_generated"

#: Maximum number of values that are listed one by one.
MAX_NAMES = 10

#: Sections of a study whose entries are points or metrics, which have fields elsewhere.
_OPEN = ("sweep", "experiments")

#: Names that are shown as code where a text has them without marks.
_CODE = re.compile(r"(?<![`\w./-])(--llem-[\w-]+|llem_\w+|[a-z]\w*_\w+|[a-z]\w*(?:\.[a-z]\w*)+)(?![`\w/=])")


def setup(app: Sphinx) -> dict[str, Any]:
    """Generate the pages, and the report of the example run, before Sphinx looks for them."""
    app.connect("builder-inited", lambda _: generate(OUTPUT))
    app.connect("builder-inited", lambda _: example_report(OUTPUT / "extra"))
    app.connect("autodoc-process-docstring", _examples, priority=400)  # before napoleon's, of 500
    return {"parallel_read_safe": True}


def example_report(folder: Path) -> None:
    """Write the report of the run in ``docs/example`` to *folder*, which is copied to the root of the site."""
    results = Path(__file__).parent.parent / "example"
    folder.mkdir(parents=True, exist_ok=True)
    write_report(results, folder / "example-report.html", StudyResult.load(results))


def _examples(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Make the section ``Example:`` of a docstring a literal block."""
    for place, line in enumerate(lines):
        if line.strip() == "Example:" and not any(one.rstrip().endswith("::") for one in lines[place:]):
            lines[place : place + 1] = [f"{line.rstrip()}:", ""]
            return


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
        "variables": variables(),
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
    plain = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"``\1``", text or "")
    return " ".join(plain.replace("``", "`").split())


def names_as_code(text: str) -> str:
    """Return *text* as Markdown, with names of options, keys and fields as code."""
    return _CODE.sub(r"`\1`", prose(text))


def sentence(text: str) -> str:
    """Return a help text as a sentence."""
    marked = names_as_code(text).rstrip(".")
    return f"{marked if marked[0] == '`' else marked[0].upper() + marked[1:]}."


# ---- studies ----


def study() -> Iterator[str]:
    """Yield every field of a study: a heading, its type, default and range, and what it means."""
    schema = study_schema(installed(ENGINE_GROUP))
    yield from _fields(schema["properties"], schema["$defs"], "", 2, _marked())


def _marked() -> dict[str, str]:
    """Return the fields' descriptions as Markdown, by their plain text in the schema."""
    models = dict.fromkeys(
        one
        for document in (ExperimentConfig, ExecutionConfig, GatesConfig, BudgetConfig, Rule)
        for one in _models(document)
    )
    texts = [text for model in models for text in field_docstrings(model).values()]
    return {" ".join(text.replace("``", "").split()): prose(text) for text in texts}


def _fields(
    fields: dict[str, Any],
    definitions: dict[str, Any],
    prefix: str,
    level: int,
    marked: dict[str, str],
    required: Iterable[str] = (),
) -> Iterator[str]:
    for name, given in fields.items():
        path = f"{prefix}{name}"
        field = _resolved(given, definitions)
        text = given.get("description") or field.get("description", "")
        text = marked.get(text) or names_as_code(text)
        facts, text = _facts(field, definitions, text)
        yield f'{{id="{path.replace("[]", "")}"}}'
        yield f"{'#' * level} `{path}`"
        yield ""
        if name in required or path == "model":
            facts.append("required")
            text = text.removesuffix(" Required.")
        if facts:
            yield f"*{', '.join(facts)}*"
            yield ""
        yield text
        yield ""
        for kind in _kinds(field, definitions) if path not in _OPEN else ():
            entry = _resolved(kind.get("items", {}), definitions)
            inner = (
                (kind, ".") if "properties" in kind and path != "budgets" else (entry, "[].") if entry else None
            )
            if inner is not None:
                of, separator = inner
                yield from _fields(
                    of.get("properties", {}),
                    definitions,
                    f"{path}{separator}",
                    min(level + 1, 3),  # the page includes them one level deeper
                    marked,
                    of.get("required", ()),
                )


def _resolved(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in field:
        *_, name = field["$ref"].split("/$defs/")
        found: Any = definitions
        for part in name.split("/"):
            found = found[part]
        field = {**found, **{key: one for key, one in field.items() if key != "$ref"}}
    return field


def _kinds(field: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the alternatives of a field, also of its alternatives."""
    if "anyOf" not in field or "properties" in field:
        return [field]
    return [inner for kind in field["anyOf"] for inner in _kinds(_resolved(kind, definitions), definitions)]


def _facts(field: dict[str, Any], definitions: dict[str, Any], text: str) -> tuple[list[str], str]:
    """Return type, range and default of a field, and *text* without a sentence that says no more than that."""
    kinds = [kind for kind in (_kind(one, definitions) for one in _kinds(field, definitions)) if kind]
    kinds = ["a list of these" if one.startswith("list of `") else one for one in kinds]
    facts = [" or ".join(dict.fromkeys(kinds))] if kinds else ["any value"]
    stated = re.search(r" ?Default `?([^`:;. ]+(?:\.\d+)?)`?\.$", text)
    if "default" in field:
        default = field["default"]
        facts.append(f"default {code(default)}")
        if stated and stated[1] in (
            str(default),
            str(default).lower(),
            f"{default:g}" if type(default) is float else "",
        ):
            text = text[: stated.start()]
    return facts, text


def _kind(kind: dict[str, Any], definitions: dict[str, Any]) -> str:
    if len(kind.get("enum", ())) > MAX_NAMES:
        return "[metric](metrics.md)"
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
    if kind.get("type") == "array":
        item = _resolved(kind.get("items", {}), definitions)
        words = (_kind(one, definitions) for one in _kinds(item, definitions)) if item else ()
        if len(item.get("enum", ())) > MAX_NAMES:
            return "list of [metrics](metrics.md)"
        return f"list of {' or '.join(dict.fromkeys(one for one in words if one))}".removesuffix(" of ")
    if kind.get("pattern", "").startswith("^http"):
        return "URL"
    if "pattern" in kind and "`" not in kind["pattern"] and ":" in kind["pattern"]:
        return "`package.module:name`"
    names = {"object": "mapping", "array": "list", "string": "text", "boolean": "true or false"}
    kinds = kind.get("type", "")
    name = names.get(kinds, kinds) if isinstance(kinds, str) else " or ".join(kinds)
    return f"{name} ({', '.join(bounds)})" if bounds else name


# ---- options ----


class _Options:
    """A parser, as pytest's, that records the declared options."""

    def __init__(self) -> None:
        self.options: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def getgroup(self, *_: str) -> _Options:
        return self

    def addoption(self, *names: str, **given: Any) -> None:
        self.options.append((names, given))

    def addini(self, *_: Any, **__: Any) -> None:
        """Ignore a key: :func:`ini` reads the declarations themselves."""


def options() -> Iterator[str]:
    """Yield every option of pytest that is ours."""
    parser = _Options()
    declarations.add_options(parser)  # type: ignore[arg-type]
    for names, given in parser.options:
        name = names[-1]
        key = name.removeprefix("--").replace("-", "_")
        value = given.get("metavar")
        facts = ["takes a value" if value else "flag"]
        if key in declarations.INI:
            facts.append(f"ini key [`{key}`](configuration.md#{key})")
        yield f"{{#{name.removeprefix('--')}}}"
        yield f"## `{f'{name}={value}' if value else name}`"
        yield ""
        yield f"*{', '.join(facts)}*"
        yield ""
        yield sentence(re.sub(r" \(ini: \w+\)|ini: \w+; ", "", given["help"]))
        yield ""


def ini() -> Iterator[str]:
    """Yield every key of the ini file."""
    kinds = {"string": "text", "bool": "true or false", "paths": "paths", "args": "patterns"}
    for name, (kind, default, text) in declarations.INI.items():
        values = "number" if re.search(r"at least|above 0", text) else kinds[kind]
        words = " ".join(default) if isinstance(default, list) else default
        yield f"{{#{name}}}"
        yield f"## `{name}`"
        yield ""
        yield f"*{values}, default {code(words) if words != '' else 'empty: not set'}*"
        yield ""
        yield sentence(text)
        yield ""


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
        yield f"*{one.unit}, {better}*"
        yield ""
        yield sentence(one.meaning)
        yield ""


def warnings() -> Iterator[str]:
    """Yield every code of a quality warning, the worst first."""
    for name, one in WARNINGS.items():
        yield f"{{#{name}}}"
        yield f"## `{name}`"
        yield ""
        yield f"*{one.severity}*"
        yield ""
        yield sentence(one.meaning)
        yield ""
        yield f"What to do: {names_as_code(one.advice)}"
        yield ""


def variables() -> Iterator[str]:
    """Yield the environment variables that results record."""
    yield ", ".join(f"[]{{#recorded-{name}}}`{name}`" for name in VARIABLES) + "."


# ---- files ----


def records(document: type[BaseModel], without: type[BaseModel] | None = None) -> Iterator[str]:
    """Yield a table of the keys of *document*, and of each record in it.

    Args:
        document: The file's model.
        without: Records that are in this one are left out: another page has them.
    """
    known = set(_models(without)) if without is not None else set()
    for model, place in _models(document).items():
        if model in known:
            continue
        yield f"## {model.__name__}"
        yield ""
        if place:
            yield f"*at `{place}`*"
            yield ""
        yield prose((model.__doc__ or "").partition("\n\n")[0])
        yield ""
        docstrings = field_docstrings(model)
        rows = (
            (
                f'[]{{id="{model.__name__.lower()}.{name}"}}`{name}`',
                _type(field.annotation),
                prose(docstrings.get(name)),
            )
            for name, field in model.model_fields.items()
        )
        yield from table(("key", "type", "meaning"), rows)


def _models(document: type[BaseModel]) -> dict[type[BaseModel], str]:
    """Return *document* and the models that it holds, in the order in which they come up, with their places.

    A place is that of the first occurrence, such as ``gpus[].users[]``; it is empty for the document.
    """
    found: dict[type[BaseModel], str] = {}

    def visit(annotation: Any, place: str) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation in found:
                return
            found[annotation] = place
            for name, field in annotation.model_fields.items():
                visit(field.annotation, f"{place}.{name}".lstrip("."))
        origin = get_origin(annotation)
        for inner in get_args(annotation):
            visit(inner, f"{place}[]" if origin is list else f"{place}.*" if origin is dict else place)

    visit(document, "")
    return found


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
