"""Jinja for chat templates: the environment that templates are written for, in a sandbox with bounds.

A template comes with a model and may be hostile. The sandbox keeps it from Python's internals and from changing
anything. Beyond that, a rendering has a deadline, checked at every turn of a loop, call of a macro and printed value,
and no operation may build a value much larger than any real chat. What remains: a single operation on values within
those bounds can take a second or so, and the deadline is noticed only after it.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_NUMBER = 100_000  # of a range's length and of a width
_MAX_BITS = 4096
_BUILT_PER_PRINTED = 20  # all texts built on the way, as a multiple of what may be printed
_WIDTHS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "round", "tojson"}
    | {"to_bytes"}
)
# These turn whole collections, or many copies of a text, into one text.
_FLATTENING = frozenset(
    {"join", "tojson", "string", "format", "format_map", "pprint", "replace", "sum", "urlencode", "xmlattr"}
)
# A width or precision of five digits or more, or one taken from the arguments, in `"…" % x` or `"…".format(x)`.
_LARGE_PERCENT_WIDTH = re.compile(r"%(\([^)]*\))?[-+ #0]*([0-9]{5}|\*|[0-9]*\.([0-9]{5}|\*))")
_LARGE_FORMAT_WIDTH = re.compile(r"\{[^{}]*:[^{}]*([0-9]{5}|\{)")


class TemplateBoundError(SecurityError):
    """A template exceeds its bounds."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Configured as chat templates expect, and bounded: renders with `render_bounded`.

    Source: transformers, `_compile_jinja_template`, for what templates may use.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, timeout_s: float, max_chars: int) -> None:
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._run = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, loopcontrols],
            finalize=self._count_printed,
        )
        self.filters["tojson"] = _to_json
        for name, function in self.filters.items():
            self.filters[name] = self._bounded(name, function)
        self.globals.pop("lipsum", None)
        self.globals |= {"range": self._range, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises: TemplateBoundError past the bounds, and whatever the template raises.
        """
        self._run.deadline = time.monotonic() + self._timeout_s
        self._run.num_printed = self._run.num_built = 0
        parts, num_chars = [], 0
        for piece in template.generate(**variables):
            self.tick()
            num_chars += len(piece)
            self._check_size(num_chars)
            parts.append(piece)
        return "".join(parts)

    def variables_of(self, source: str) -> frozenset[str]:
        """The names that a template takes from its surroundings."""
        return frozenset(meta.find_undeclared_variables(self.parse(source)))

    def names_in(self, source: str) -> frozenset[str]:
        """What a template may read of its variables' insides, or look for there: attributes and short texts."""
        tree = self.parse(source)
        texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return frozenset(texts | {node.attr for node in tree.find_all(nodes.Getattr)})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _AddTicks().visit(super()._parse(source, name, filename))
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A binary operation, unless its result would be too large."""
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._check_size(len(left) + len(right))
        elif operator == "*":
            self._check_product(left, right)
            self._check_product(right, left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(max(left.bit_length(), 1) * max(right, 0))
        elif operator == "%" and isinstance(left, str | bytes):
            self._check_arguments("format", (left, right), {})
        return self._checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call, unless its arguments or its result are too large."""
        __self.tick()
        # The sandbox wraps `str.format` in a function of its own.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        values = (owner, *args) if isinstance(owner, str | bytes | int) else args
        __self._check_arguments(getattr(__obj, "__name__", ""), values, kwargs)
        return __self._checked(super().call(__context, __obj, *args, **kwargs))

    def tick(self) -> str:
        """Looks at the clock.

        Raises: TemplateBoundError past the deadline.
        """
        # Jinja evaluates some constants when it compiles, before any rendering.
        if time.monotonic() > getattr(self._run, "deadline", math.inf):
            raise TemplateBoundError(f"it takes longer than {self._timeout_s} s")
        return ""

    def concat_values(self, *values: Any) -> str:
        """The `~` operator."""
        self._check_nested(values)
        return str(self._checked("".join(map(str, values))))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # keeps the mark that asks Jinja for the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            self._check_arguments(name, args[skipped:], kwargs)
            if name in _FLATTENING and isinstance(args[skipped], Iterator):
                args = (*args[:skipped], self._counted(args[skipped]), *args[skipped + 1 :])
            return self._checked(function(*args, **kwargs))

        return bounded

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        num = 0
        for item in items:
            num += 1 + (len(item) if isinstance(item, str) else 0)
            self._check_size(num)
            yield item

    def _check_arguments(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuses what would make the function or method `name` build too much. `args` begins with what it works on."""
        values = [*args, *kwargs.values()]
        widths = [value for value in values[1:] if isinstance(value, int)] if name in _WIDTHS else []
        if any(abs(width) > _MAX_NUMBER for width in widths):
            raise TemplateBoundError(f"a number given to {name!r} is beyond ±{_MAX_NUMBER}")
        texts = [value for value in values if isinstance(value, str | bytes)]
        if name in ("format", "format_map") and texts:
            text = texts[0] if isinstance(texts[0], str) else texts[0].decode("latin-1")
            if _LARGE_PERCENT_WIDTH.search(text) or _LARGE_FORMAT_WIDTH.search(text):
                raise TemplateBoundError(f"a width in {name!r} is too large")
        if name == "replace" and len(texts) >= 3:
            count = texts[0].count(texts[1]) if texts[1] else len(texts[0]) + 1  # type: ignore[arg-type]
            self._check_size(len(texts[0]) + count * len(texts[2]))
        if name == "join" and texts:
            items = next((value for value in values if isinstance(value, list | tuple | dict)), ())
            self._check_size(len(items) * len(texts[0]))
        if name == "indent" and texts:
            self._check_size((texts[0].count("\n") + 1) * (max(map(abs, widths), default=4) + len(texts[-1])))  # type: ignore[arg-type]
        if name in _FLATTENING:
            self._check_nested(values)

    def _check_nested(self, value: Any) -> None:
        """Counts the characters and items in nested collections, and stops past the bound."""
        num, stack = 0, [value]
        while stack:
            item = stack.pop()
            num += 1 + (len(item) if isinstance(item, str) else 0)
            self._check_size(num)
            if isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                stack += item

    def _check_product(self, number: Any, other: Any) -> None:
        if isinstance(number, int) and isinstance(other, int):
            self._check_bits(number.bit_length() + other.bit_length())
        elif isinstance(number, int) and hasattr(other, "__len__"):
            self._check_size(number * len(other))

    def _check_bits(self, num_bits: int) -> None:
        if num_bits > _MAX_BITS:
            raise TemplateBoundError("a number is too large")

    def _check_size(self, size: int) -> None:
        if size > self._max_chars:
            raise TemplateBoundError(f"it builds more than {self._max_chars} characters or items")

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str | bytes | list | tuple | dict):
            self._check_size(len(value))
            self._run.num_built = getattr(self._run, "num_built", 0) + len(value)
            if self._run.num_built > _BUILT_PER_PRINTED * self._max_chars:
                raise TemplateBoundError(
                    f"it builds more than {_BUILT_PER_PRINTED * self._max_chars} characters in all"
                )
        return value

    def _count_printed(self, value: Any) -> Any:
        """Jinja's `finalize`: every value on its way into the output or a `{% set %}` block."""
        if not isinstance(value, str):
            self._check_nested(value)
            value = str(value)
        self._run.num_printed = getattr(self._run, "num_printed", 0) + len(value)
        self._check_size(self._run.num_printed)
        return value

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if abs(numbers.stop - numbers.start) // abs(numbers.step) > _MAX_NUMBER:
            raise TemplateBoundError(f"a range is longer than {_MAX_NUMBER}")
        return numbers


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what to train on: here it only shows its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _AddTicks(NodeTransformer):
    """Has loops and macros look at the clock, and `~` at the size of its result."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._with_tick(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._with_tick(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._with_tick(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)  # type: ignore[assignment]
        return _call("concat_values", node.nodes, node.lineno)

    def _with_tick(self, node: Any) -> nodes.Node:
        visited: Any = self.generic_visit(node)
        visited.body.insert(0, nodes.ExprStmt(_call("tick", [], visited.lineno), lineno=visited.lineno))
        with_tick: nodes.Node = visited
        return with_tick


def _call(method: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=lineno), args, [], None, None, lineno=lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
