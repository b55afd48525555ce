"""What is public says what it gives: effects, shapes, units, errors, and where a method comes from."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jaxllama
from jaxllama.decode.sampling import FILTERS, apply_penalties

ROOT = Path(__file__).parents[2]
NO_UNIT = {"timeout", "duration", "delay", "interval", "deadline", "memory", "bandwidth"}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function and every method of our own that `import jaxllama` gives."""
    for name in jaxllama.__all__:
        value = getattr(jaxllama, name)
        if inspect.ismodule(value):
            yield from ((f"{name}.{each}", getattr(value, each)) for each in value.__all__ if each[0].islower())
        elif not inspect.isclass(value):
            yield name, value
        else:
            for each, member in inspect.getmembers(value):
                function = member.fget if isinstance(member, property) else inspect.unwrap(member)
                ours = getattr(function, "__module__", "") or ""
                if not each.startswith("_") and inspect.isroutine(function) and ours.startswith("jaxllama"):
                    yield f"{name}.{each}", function


FUNCTIONS = dict(public())


def tree_of(function: Callable[..., Any]) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def test_there_is_something_to_look_at():
    assert {"load", "Llama.generate", "Llama.trace", "Llama.score", "functional.steps", "Engine.submit"} <= set(
        FUNCTIONS
    )
    assert len(jaxllama.__all__) <= 25
    assert len(jaxllama.functional.__all__) <= 10


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_is_raised_and_arrays_have_shapes(name):
    function, tree = FUNCTIONS[name], tree_of(FUNCTIONS[name])
    text = inspect.getdoc(function) or ""
    assert text, "no docstring"
    raised = {node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None}
    assert not raised or "Raises:" in text, "raises, and its docstring does not say what"
    # jaxtyping's shapes: `Float[Array, "batch tokens"]`, never a bare array.
    annotations = ast.unparse(tree.args) + (ast.unparse(tree.returns) if tree.returns else "")
    bare = re.findall(r"(?<![\w\[])(?:jax\.)?Array\b|np\.ndarray(?!, )", annotations)
    said_in_words = re.search(r"`\[[^]]*\]", text)
    assert not bare or said_in_words, f"arrays without a shape: {annotations}"
    parameters = [arg.arg for arg in (*tree.args.args, *tree.args.kwonlyargs)]
    assert not [each for each in parameters if each.split("_")[-1] in NO_UNIT], "a quantity without its unit"


def test_what_comes_from_a_paper_says_which():
    """The filters and penalties, steering, and what is drawn on them."""
    for function in (*FILTERS.values(), apply_penalties, jaxllama.Steering, jaxllama.Llama.unembed):
        assert "Source:" in (inspect.getdoc(function) or ""), function


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference" / "python.md").read_text()
    missing = [name for name in jaxllama.__all__ if f"jaxllama.{name}" not in text]
    assert not missing, f"docs/reference/python.md lacks {', '.join(missing)}"


SHAPED = re.compile(r"(Bool|Float|Int|UInt|Shaped)\d*$")


def bare_arrays(node: ast.AST | None) -> Iterator[str]:
    """The arrays of an annotation that have no shape. A function's own arguments are its own business."""
    match node:
        case ast.Subscript(value=ast.Name(id=name)) if name == "Callable" or SHAPED.match(name):
            return
        case ast.Name(id="Array") | ast.Attribute(value=ast.Name(id="jax" | "np"), attr="Array" | "ndarray"):
            yield ast.unparse(node)
    for child in ast.iter_child_nodes(node) if node is not None else ():
        yield from bare_arrays(child)


def test_every_array_that_a_function_takes_has_a_shape():
    paths = [path for folder in ("jaxllama", "convert", "serving") for path in (ROOT / folder).rglob("*.py")]
    bare, num_shaped = [], 0
    for path in sorted(paths):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                found = [*bare_arrays(each.annotation)]
                bare += [f"{path.relative_to(ROOT)}:{each.lineno}: {each.arg}: {array}" for array in found]
                num_shaped += not found and each.annotation is not None and "rray" in ast.unparse(each.annotation)
    assert not bare, "\n".join(bare)
    assert num_shaped > 300
