"""What an error means and what to do about it: `jaxllama explain NAME`, and the same pages in the documentation."""

from __future__ import annotations

import difflib
import importlib
import inspect

from jaxllama.errors import JaxLlamaError, RequestError, one_line

# Where errors are defined. The applications' are explained where they are installed.
ERROR_MODULES = (
    "jaxllama.errors",
    "jaxllama_convert.staging",
    "jaxllama_serving.config",
    "jaxllama_serving.batch.files",
    "jaxllama_serving.client.api",
    "jaxllama_serving.client.bench_cli",
    "jaxllama_serving.client.conversation",
    "jaxllama_serving.client.workload",
)
_MAX_LINE_CHARS = 300


def known_errors() -> dict[str, type[JaxLlamaError]]:
    """Every exception that is raised on purpose and is installed, by name, a base before what derives from it."""
    found: dict[str, type[JaxLlamaError]] = {}
    for module in ERROR_MODULES:
        try:
            values = vars(importlib.import_module(module)).values()
        except ModuleNotFoundError:
            continue
        for value in values:
            if isinstance(value, type) and issubclass(value, JaxLlamaError) and value.__module__ == module:
                found[value.__name__] = value
    return found


def page_of(name: str) -> str:
    """What the error of that name means, in Markdown. Upper and lower case, and the ending "Error", do not matter.

    Raises: RequestError naming those that are most alike.
    """
    errors = known_errors()
    by_key = {_key(known): known for known in errors}
    if _key(name) not in by_key:
        alike = difflib.get_close_matches(_key(name), by_key, n=3) or [*by_key][1:6]
        named = ", ".join(by_key[key] for key in alike)
        raise RequestError(f"{one_line(name, 80)!r} is no error of jaxllama. Is it one of {named}?", "name")
    error = errors[by_key[_key(name)]]
    bases = [base.__name__ for base in error.__mro__[1:] if issubclass(base, Exception) and base is not Exception]
    return f"{inspect.getdoc(error)}\n\nIt is also a {', '.join(bases)}." if bases else str(inspect.getdoc(error))


def with_page(error: Exception) -> str:
    """The error's message and, where that fits in a line, how to read its page."""
    message, name = str(error), type(error).__name__
    hint = f" (jaxllama explain {name})"
    is_explained = isinstance(error, JaxLlamaError) and type(error).__module__ in ERROR_MODULES
    return message + hint if is_explained and len(message) + len(hint) <= _MAX_LINE_CHARS else message


def _key(name: str) -> str:
    return name.lower().removesuffix("error")
