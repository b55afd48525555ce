"""The kernels' part of `jaxllama check` when an engine starts on a TPU or GPU: a kernel that computes something else
there than where it was written is not used.

It takes seconds, and once is enough: the verdict is kept beside the compiled programs, for these versions, this kind of
device and these shapes. On CPUs it is left out: their kernels are tested on CPUs, and a start there takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllama.errors import one_line
from jaxllama.model import attention
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.agreement import agreements
from jaxllama.model.config import LlamaConfig
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.platforms.platform import Platform
from jaxllama.system.versions import installed

logger = logging.getLogger("jaxllama.model")

CHECKED = ("tpu", "gpu")


def describe_checked(
    config: LlamaConfig, mesh: Mesh, dtype: Any, kv_dtype: Any, quantize: str | None, page_size: int | None
) -> Platform:
    """As `describe_platform`, with the reference in place of a kernel that does not agree with it.

    `page_size` None is the platform's own. Processes that share the mesh come to one verdict.
    """
    platform = describe_platform(config, mesh, dtype=dtype, kv_dtype=kv_dtype, quantize=quantize)
    if platform.name not in CHECKED or type(platform.kernel) is ReferenceAttention:
        return platform
    shared = platform.most_chunks_in_group
    fault = _for_all(mesh, _known_or_found(config, mesh, jnp.dtype(dtype), jnp.dtype(kv_dtype), page_size, shared))
    if fault is None:
        return platform
    logger.error("%s The reference runs in its place, slower. `jaxllama check` tells more; please report it", fault)
    plain = ShardedAttention(ReferenceAttention(), platform.attention.mesh)
    return replace(
        platform,
        attention=plain,
        head_layout=None,
        needs_clean_pages=False,
        has_layer_kernel=False,
        kernel_fault=fault,
    )


def fault_of(config: LlamaConfig, mesh: Mesh, *, dtype: Any, kv_dtype: Any, page_size: int | None = None) -> str | None:
    """What a kernel does wrong on these devices, in a sentence; None if nothing, or if there is no kernel."""
    # Two layers: a page's number says which layer's it is.
    config = config.cut_to(min(2, config.num_layers))
    platform = describe_platform(config, mesh, dtype=dtype, kv_dtype=kv_dtype)
    if type(platform.kernel) is ReferenceAttention or config.windows:
        return None
    name = f"the kernel {type(platform.kernel).__name__} for a cache of {jnp.dtype(kv_dtype).name}"
    try:
        found = agreements(
            platform.attention,
            config,
            page_size=page_size or platform.page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            needs_clean_pages=platform.needs_clean_pages,
            layout=platform.head_layout,
            chunks_in_group=platform.most_chunks_in_group,
        )
    except Exception as error:  # Whatever the compiler makes of it: with the reference the model still runs.
        return f"{name} does not run here: {one_line(error)}."
    wrong = [
        f"{each.call} is {each.in_words}"
        if not each.share <= 1
        else f"{each.call} of a row alone has other bits than in a batch"
        for each in found
        if not each.holds
    ]
    return f"{name} computes something else than the reference here: {'; '.join(wrong)}." if wrong else None


def _known_or_found(
    config: LlamaConfig,
    mesh: Mesh,
    dtype: np.dtype[Any],
    kv_dtype: np.dtype[Any],
    page_size: int | None,
    chunks_in_group: int,
) -> str | None:
    sizes = (config.num_heads, config.num_kv_heads, config.head_dim, page_size, dtype.name, kv_dtype.name)
    device = mesh.devices.flat[0]
    parts = [
        installed(),
        device.device_kind,
        dict(mesh.shape),
        *sizes,
        chunks_in_group,
        _sources(),
        jax.config.jax_default_matmul_precision,
    ]
    name = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]
    folder = jax.config.jax_compilation_cache_dir
    path = Path(folder) / f"kernels-{name}.json" if folder and "://" not in str(folder) else None
    if path is not None:
        try:
            known: str | None = json.loads(path.read_text("utf-8"))["fault"]
            return known
        except (OSError, ValueError, KeyError, TypeError):
            pass  # Not there, or cut off: looked at once more.
    started = time.monotonic()
    fault = fault_of(config, mesh, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size)
    logger.info("looked at the kernels of attention in %.1f s", time.monotonic() - started)
    if path is not None:
        try:
            path.write_text(json.dumps({"fault": fault}), "utf-8")
        except OSError as error:
            logger.info("the verdict on the kernels cannot be kept in %s: %s", path, error)
    return fault


def _sources() -> str:
    """A hash of the code of all kernels: an edited one is looked at again."""
    folder = Path(attention.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()


def _for_all(mesh: Mesh, fault: str | None) -> str | None:
    """`fault`, or that another process of the mesh has one."""
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return fault
    from jax.experimental import multihost_utils

    all_faults: Any = multihost_utils.process_allgather(np.int32(fault is not None))
    if fault is None and np.any(all_faults):
        return f"a kernel does not hold in process {int(np.argmax(all_faults))}, whose log says more."
    return fault
