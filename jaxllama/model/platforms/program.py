"""Programs that are compiled as their platform wants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import CompilerOptions, Platform


class Program[T]:
    """A function with a keyword `platform`, jitted with that platform's compiler options, which `jax.jit` fixes.

    `platform` is static; left out, it is `PLAIN`.
    """

    def __init__(self, function: Callable[..., T], **jit_options: Any) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._jit_options = jit_options
        self._jit = functools.cache(self._jit_with)

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """Runs it."""
        result: T = self._jitted(kwargs)(*args, **kwargs)
        return result

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of a jitted function: arrays or their shapes to what can be compiled."""
        return self._jitted(kwargs).lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As of a jitted function."""
        return self._jitted(kwargs).trace(*args, **kwargs)

    def _jitted(self, kwargs: dict[str, Any]) -> Any:
        platform: Platform = kwargs.get("platform", PLAIN)
        return self._jit(platform.compiler_options)

    def _jit_with(self, options: CompilerOptions) -> Any:
        return jax.jit(self._function, compiler_options=dict(options), **self._jit_options)


def program[T](
    *, donate_argnames: str | tuple[str, ...], static_argnames: tuple[str, ...]
) -> Callable[[Callable[..., T]], Program[T]]:
    """Decorates a function with a keyword `platform`; the arguments are `jax.jit`'s, `platform` is static anyway."""
    return lambda function: Program(
        function, donate_argnames=donate_argnames, static_argnames=(*static_argnames, "platform")
    )
