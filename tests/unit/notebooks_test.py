"""The notebooks parse, open with how to run them, and name only what there is. `e2e/notebook_test.py` runs them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import nbformat
import pytest

import jaxllama

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CALLS = ("SamplingParams", "EngineOptions", "Patch", "Steering", "Structured", "load", "make_mesh")


def source_of(path: Path) -> ast.Module:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))


def missing_names(tree: ast.Module) -> list[str]:
    """Names of ours that a notebook uses and that are not there, keywords included."""
    owners = {"jaxllama": jaxllama, "functional": jaxllama.functional, "llama": jaxllama.Llama}
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxllama":
            assert node.module == "jaxllama", f"a notebook imports from {node.module}, which is not public"
            missing += [alias.name for alias in node.names if alias.name not in jaxllama.__all__]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
            owner = owners[node.value.id]
            # What a model has from its making on: `llama.tokenizer`.
            own = inspect.getsource(owner.__init__) if inspect.isclass(owner) else ""
            if not (hasattr(owner, node.attr) or f"self.{node.attr} =" in own):
                missing.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in CALLS:
                known = inspect.signature(getattr(jaxllama, name)).parameters
                missing += [f"{name}({word.arg}=)" for word in node.keywords if word.arg and word.arg not in known]
    return missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_parses_and_names_only_what_there_is(path: Path):
    assert not missing_names(source_of(path))


def test_a_name_that_is_not_there_is_found():
    lines = ("from jaxllama import Nothing", "jaxllama.lode('x')", "llama.generat('x')", "SamplingParams(heat=1)")
    found = missing_names(ast.parse("\n".join((*lines, "functional.step()"))))
    assert sorted(found) == ["Nothing", "SamplingParams(heat=)", "functional.step", "jaxllama.lode", "llama.generat"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_how_to_run_it_and_has_its_pictures(path: Path):
    notebook = nbformat.read(path, as_version=4)
    opening = notebook.cells[0].source
    assert "pip install '.[plot]'" in opening
    assert "'.[plot,tpu]'" in opening
    assert "JAXLLAMA_CHECKPOINT" in opening
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "saved without its pictures"
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 400_000


def test_every_notebook_is_a_page_and_is_run():
    table = (ROOT / "docs" / "tutorials" / "notebooks.md").read_text()
    run = (ROOT / "tests" / "e2e" / "notebook_test.py").read_text()
    for path in NOTEBOOKS:
        assert f"../generated/notebooks/{path.stem}" in table, path.stem
        assert re.search(rf'"{path.stem}": \(', run), path.stem
