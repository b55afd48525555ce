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


@dataclass(frozen=True)
class Peaks:
    """What one device can do at most in bfloat16, as its maker publishes it, without sparsity."""

    flops_per_s: float
    hbm_bytes_per_s: float


# By what a GPU's name begins with, the longer names first. Source: NVIDIA's data sheets.
_GPUS = {
    "NVIDIA B200": Peaks(2250e12, 8000e9),
    "NVIDIA H200": Peaks(989e12, 4800e9),
    "NVIDIA H100 PCIe": Peaks(756e12, 2000e9),
    "NVIDIA H100 NVL": Peaks(835e12, 3900e9),
    "NVIDIA H100": Peaks(989e12, 3350e9),
    "NVIDIA A100-SXM4-40GB": Peaks(312e12, 1555e9),
    "NVIDIA A100-PCIE-40GB": Peaks(312e12, 1555e9),
    "NVIDIA A100": Peaks(312e12, 1935e9),
    "NVIDIA L40S": Peaks(362e12, 864e9),
    "NVIDIA L4": Peaks(121e12, 300e9),
}


def public_peaks(device_kind: str) -> Peaks | None:
    """Of a `jax.Device.device_kind`; None for one that is not known."""
    generation = GENERATIONS.get(DEVICE_KINDS.get(device_kind, ""))
    if generation is not None:
        return Peaks(generation.flops_per_s, generation.hbm_bytes_per_s)
    return next((peaks for name, peaks in _GPUS.items() if device_kind.startswith(name)), None)
