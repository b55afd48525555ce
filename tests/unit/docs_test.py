"""The documentation says what is true: its code compiles, its commands, routes, extras and files exist.

`unit/deploy/commands_test.py` parses every `jaxllama` command, `e2e/docs_test.py` runs what can be run here.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from urllib.parse import urlsplit

import documentation
import pytest
from documentation import NEEDS, PAGES, ROOT, Block, all_blocks, blocks_of
from jaxllama_serving.http.routes import ROUTES

PYTHON = [block for block in all_blocks() if block.language == "python"]
SHELL = [block for block in all_blocks() if block.language == "sh"]
LANGUAGES = {"python", "sh", "json", "text", "mermaid"}


def test_blocks_and_their_needs_are_found():
    text = "a\n<!-- needs: tpu, network -->\n```sh\nrun\n```\n\n```python\nx = 1\n```\n"
    marked, plain = blocks_of("page.md", text)
    assert (marked.needs, marked.line, marked.text) == (("tpu", "network"), 3, "run\n")
    assert (plain.needs, plain.language) == ((), "python")
    assert len(PYTHON) >= 8
    assert len(SHELL) >= 25


def test_every_block_has_a_language_and_known_needs():
    wrong = [
        str(block) for block in all_blocks() if block.language not in LANGUAGES or not set(block.needs) <= set(NEEDS)
    ]
    assert not wrong
    bare = [page for page in PAGES if re.search(r"^```\n(?!\n|$)(?=[^`]*^```$)", _without_blocks(page), re.M)]
    assert not bare, "a block needs a language: text, if it is none"


def _without_blocks(page: str) -> str:
    return documentation._BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_what_it_imports_exists(block: Block):
    for missing in missing_names(ast.parse(block.text)):
        pytest.fail(f"{block}: {missing} does not exist")


def missing_names(tree: ast.AST) -> Iterator[str]:
    """Imported names, and attributes of `jaxllama`, that do not exist."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name))
        elif ast.unparse(node).startswith("jaxllama.") and isinstance(node, ast.Attribute):
            is_ours = isinstance(node.value, ast.Name)
            if is_ours and not hasattr(importlib.import_module("jaxllama"), node.attr):
                yield f"jaxllama.{node.attr}"


def test_a_name_that_does_not_exist_is_found():
    tree = ast.parse("from jaxllama import load, distribute\nimport jaxllama\njaxllama.lode('x')\n")
    assert [*missing_names(tree)] == ["jaxllama.distribute", "jaxllama.lode"]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_is_shell_and_what_it_names_exists(block: Block):
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", block.text, re.M):
        assert f"\n{target}:" in makefile, f"{block}: make has no target {target}"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"(?:jaxllama|\.)\[([a-z0-9,]+)\]", block.text):
        assert set(extras.split(",")) <= set(known), f"{block}: pyproject has no extra of {extras}"
    for path in re.findall(r"(?<=\s)(?:serving|bench|tests|notebooks)/[\w./-]+", block.text):
        assert (ROOT / path).exists(), f"{block}: {path} does not exist"


@pytest.mark.parametrize("block", [block for block in SHELL if "curl" in block.text and "-d '" in block.text], ids=str)
def test_a_request_is_one_that_the_server_takes(block: Block):
    words = shlex.split(block.text.replace("\\\n", " "))
    url = next(word for word in words if "localhost:" in word)
    path = urlsplit(url if "://" in url else f"http://{url}").path.removeprefix("/v1").removeprefix("/openai")
    (route,) = [route for route in ROUTES if route.path == path and route.method == "POST"]
    assert route.body is not None
    body = json.loads(words[words.index("-d") + 1])
    parsed = route.body.model_validate(body)
    assert not parsed.model_extra, f"{block}: unknown fields {sorted(parsed.model_extra or {})}"


def test_a_folder_of_the_documentation_is_no_heap():
    """As folders of code: at most twelve entries. What the build makes is not counted."""
    folders = {(ROOT / page).parent for page in PAGES}
    entries = {folder: [path for path in folder.iterdir() if path.name not in documentation.MADE] for folder in folders}
    entries.pop(ROOT)
    crowded = {str(folder): len(names) for folder, names in entries.items() if len(names) > 12}
    assert not crowded


def test_every_page_is_in_a_table_of_contents():
    tables = [
        block for page in PAGES for block in re.findall(r"```{toctree}\n(.*?)```", (ROOT / page).read_text(), re.S)
    ]
    listed = {line.split("<")[-1].strip(" >").rsplit("/", 1)[-1] for table in tables for line in table.splitlines()}
    pages = {page.rsplit("/", 1)[-1].removesuffix(".md") for page in PAGES if page.startswith("docs/")}
    assert pages - listed - {"index"} == set()


@pytest.mark.parametrize("page", [*PAGES, "serving/README.md", "convert/README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str):
    """Files alone: headings, and what is generated, are checked by the build."""
    folder = (ROOT / page).parent
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"(?:\]\(|src(?:set)?=\")([^)#\"\s]+)", text)
    local = [link for link in links if "://" not in link and "generated/" not in link]
    broken = [link for link in local if not (folder / link).exists()]
    assert not broken
