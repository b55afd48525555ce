"""Programs that are compiled as their platform wants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxllama.model.mesh import InPlace
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import CompilerOptions, Platform


class Program[T]:
    """A function with a keyword `platform`, jitted in place with that platform's compiler options.

    `platform` is static; left out, it is `PLAIN`. `is_step`: its `step_options` are the program's too. The other
    arguments are those of `InPlace`.
    """

    def __init__(
        self,
        function: Callable[..., T],
        given: str,
        result: Callable[[Any], Any],
        static_argnames: tuple[str, ...],
        is_step: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self._is_step = is_step
        options: dict[str, Any] = {"result": result, "static_argnames": (*static_argnames, "platform")}

        @functools.cache
        def jit(compiler_options: CompilerOptions) -> InPlace[T]:
            return InPlace(function, given, **options, compiler_options=dict(compiler_options))

        self._jit = jit

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """Runs it."""
        return self._jitted(kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of a jitted function: arrays or their shapes to what can be compiled."""
        return self._jitted(kwargs).lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As of a jitted function."""
        return self._jitted(kwargs).trace(*args, **kwargs)

    def _jitted(self, kwargs: dict[str, Any]) -> InPlace[T]:
        platform: Platform = kwargs.get("platform", PLAIN)
        return self._jit(platform.compiler_options + (platform.step_options if self._is_step else ()))


def program[T](
    given: str,
    *,
    static_argnames: tuple[str, ...],
    result: Callable[[Any], Any] = lambda given: given,
    is_step: bool = False,
) -> Callable[[Callable[..., T]], Program[T]]:
    """Decorates a function with a keyword `platform`, which is static anyway; see `InPlace`."""
    return lambda function: Program(function, given, result, static_argnames, is_step)
