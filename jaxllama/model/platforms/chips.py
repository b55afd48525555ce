"""The chips that are known, and what each can do at most. No JAX."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")


@dataclass(frozen=True)
class Generation:
    """One TPU generation; the figures are those of one JAX device, of which a chip has `devices_per_chip`.

    `hbm_bytes` is what the TPU compiler lets a program use, a little less than is built in. `clock_hz` is that of the
    compiler's cycle estimates. `link_bytes_per_s` is what one direction of one link to a neighbour carries.
    `chip_config` is libtpu's name for how cores form devices, "" for the default.

    Source: cloud.google.com/tpu/docs/system-architecture-tpu-vm (peaks), libtpu's RESOURCE_EXHAUSTED errors (memory),
    Austin et al. 2025, "How to Scale Your Model", chapter 2 (links; a tpu7x's are taken as a v5p's).
    """

    name: str
    devices_per_chip: int
    flops_per_s: float
    hbm_bytes_per_s: float
    hbm_bytes: int
    clock_hz: float
    link_bytes_per_s: float
    sizes: tuple[str, ...]
    chip_config: str = ""


GENERATIONS = {
    generation.name: generation
    for generation in (
        # Both cores of a v4 chip are one JAX device, which libtpu calls megacore.
        Generation("v4", 1, 275e12, 1228e9, int(30.75 * GIB), 1.05e9, 45e9, _CUBIC, "megacore"),
        Generation("v5e", 1, 197e12, 819e9, int(15.75 * GIB), 1.5e9, 45e9, _FLAT),
        Generation("v5p", 1, 459e12, 2765e9, int(95.73 * GIB), 1.75e9, 90e9, _CUBIC),
        Generation("v6e", 1, 918e12, 1640e9, int(31.24 * GIB), 1.75e9, 90e9, _FLAT),
        Generation("tpu7x", 2, 1153e12, 3690e9, int(94.74 * GIB), 1.9e9, 90e9, _CUBIC),
    )
}

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""`jax.Device.device_kind` to the generation's name."""
