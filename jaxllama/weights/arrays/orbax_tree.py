"""Orbax's own files beside arrays that are written already. The only module that knows Orbax."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import ParamSpec, build_params

type Take = Callable[[str, Path], None]
"""Called with an array's name and where Orbax wants it."""


def write_tree(
    folder: Path, config: LlamaConfig, quantize: str | None, dtype_of: Callable[[ParamSpec], np.dtype], take: Take
) -> None:
    """Makes `folder` an Orbax PyTree checkpoint of the Params tree. `take` puts each array into it.

    Raises: OSError; ValueError or RuntimeError of Orbax.
    """

    def staged(part: ParamSpec) -> _Staged:
        return _Staged(part.name, part.shape, dtype_of(part))

    tree = build_params(config, staged, quantize)
    registry = ocp.type_handlers.create_type_handler_registry((_Staged, _TakeStaged(take)))
    # Of many processes one does this, and must not wait for the others.
    alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    with _quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


@dataclass(frozen=True)
class _Staged:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class _TakeStaged(ocp.type_handlers.TypeHandler):
    """Orbax's view of an array whose bytes already are as Orbax would write them.

    NumPy's, not JAX's: those cannot be restored without naming a sharding.
    """

    def __init__(self, take: Take) -> None:
        self._take = take

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            self._take(value.name, Path(info.parent_dir / info.name))
        return []


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Hides Orbax's routine messages, which it logs as warnings, for the duration of one call."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
