"""The pages that the code itself writes: the command's flags, the HTTP API, the errors; and the notebooks."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from jaxllama import errors
from jaxllama.__main__ import _parser
from jaxllama.system.explain import known_errors, page_of

ROOT = Path(__file__).parents[1]


def write_pages(folder: Path) -> None:
    """Writes every page into `folder`. What has not changed keeps its time, so Sphinx does not read it again."""
    folder.mkdir(exist_ok=True)
    pages = {"cli.md": cli_page(), "http-api.md": http_api_page(), "errors.md": errors_page()}
    pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    # Where it was until there were several: a page in no table of contents.
    (folder / "notebook.ipynb").unlink(missing_ok=True)
    (folder / "notebooks").mkdir(exist_ok=True)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy2(path, folder / "notebooks" / path.name)


def cli_page() -> str:
    """Every command, its arguments in their groups, as argparse knows them."""
    lines = [
        "# The command line",
        "",
        "`jaxllama COMMAND --help` prints the same. Exit codes: 0 done, 1 a failure, 2 bad input.",
        "",
    ]
    for name, parser in commands().items():
        lines += [f"## jaxllama {name}", "", _cell(parser.description or ""), ""]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
            if not actions:
                continue
            title = (group.title or "").replace("options", "flags").replace("positional arguments", "arguments")
            lines += [f"**{title}**", ""]
            if group.description:
                lines += [_cell(group.description), ""]
            lines += ["| | |", "| --- | --- |", *(_flag_row(parser, action) for action in actions), ""]
    return "\n".join(lines)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by name."""
    (choices,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices)


def _flag_row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else parser._get_formatter()._format_args(action, (action.dest or "").upper())
    name = f"{', '.join(action.option_strings)} {value}".strip() if action.option_strings else value
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"| `{_cell(name)}` | {_cell(text)} |"


def http_api_page() -> str:
    """Routes, and the fields of every request and answer, from the OpenAPI document that the server generates."""
    from jaxllama_serving.http.openapi import ERRORS, make_openapi
    from jaxllama_serving.http.routes import ROUTES

    document = make_openapi(ROUTES, ("default",), needs_key=False)
    lines = [
        "# The HTTP API",
        "",
        "Made from the document that the server itself serves as `/openapi.json`: the same models validate requests.",
        "",
        "## Routes",
        "",
        "| route | request | answer |",
        "| --- | --- | --- |",
    ]
    for route in ROUTES:
        path = f"{route.prefixes[-2] if len(route.prefixes) > 1 else ''}{route.path}"
        body = _model_link(route.body.__name__) if route.body else ""
        answer = [_model_link(model.__name__) for model in (route.response, route.chunk) if model is not None]
        lines.append(f"| `{route.method} {path}` | {body} | {', streamed '.join(answer) or f'`{route.media_type}`'} |")
    lines += ["", "## Errors", "", "| status | means |", "| --- | --- |"]
    lines += [f"| {status} | {_cell(text)} |" for status, text in ERRORS.items()]
    lines += ["", "## Models", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += [f"### {name}", ""]
        if schema.get("description"):
            lines += [_cell(schema["description"]), ""]
        if "properties" not in schema:
            lines += [f"{_type_of(schema)}.", ""]
            continue
        lines += ["| field | type | |", "| --- | --- | --- |"]
        needed = schema.get("required", [])
        for field, inner in schema["properties"].items():
            text = inner.get("description", "")
            if "default" in inner and inner["default"] is not None:
                text += f" Default: `{inner['default']}`."
            lines.append(
                f"| `{field}`{' (required)' if field in needed else ''} | {_cell(_type_of(inner))} | {_cell(text)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _model_link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _type_of(schema: dict[str, Any]) -> str:
    """A schema in words; `null` is left out, since it means "not given" everywhere."""
    if "$ref" in schema:
        return _model_link(schema["$ref"].rsplit("/", 1)[1])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            kinds = [_type_of(inner) for inner in schema[key] if inner.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value!r}`" for value in values if value is not None).replace("'", '"')
    kind = str(schema.get("type", "any"))
    if kind == "array":
        inner = schema.get("items", {})
        return f"array of {_type_of(inner)}" if inner else "array"
    bounds = [
        f"{sign} {schema[key]:,}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return f"{kind} {', '.join(bounds)}".strip()


def errors_page() -> str:
    """A section for each exception: what `jaxllama explain` prints."""
    tree = (errors.__doc__ or "").split("\n\n")[1]
    lines = [
        "# Errors",
        "",
        "Every error that is raised on purpose. `jaxllama explain NAME` prints the same, without a browser.",
        "",
        "```text",
        tree,
        "```",
        "",
    ]
    for name in known_errors():
        lines += [f"## {name}", "", page_of(name), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
