"""Many hosts: which processes serve together, from the flags or from what a TPU slice says of itself."""

from __future__ import annotations

import argparse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxllama.errors import ConfigError
from jaxllama.hosts.group import parse_address
from jaxllama_serving.config import ServerConfigError

POD_PORT = 8492
"""Where process 0 of a TPU slice listens. Neither JAX's port (8482) nor one of the TPU runtime's (8471 …)."""

_METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{key}"
_METADATA_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Hosts:
    """The processes that serve together, and which of them this is."""

    coordinator: str
    num_processes: int
    process_id: int


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that say which processes serve together."""
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 meets the others; the same for all (default on a TPU slice: its first host)",
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many, one a host; 1 never looks for others")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1; process 0 alone serves HTTP")
    group.add_argument(
        "--join-timeout",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="how long to wait for the others (default: %(default)g)",
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="how long a process may be silent before it counts as gone, and all end (default: %(default)g)",
    )


def find_hosts(args: argparse.Namespace, environ: Mapping[str, str], dev: Path = Path("/dev")) -> Hosts | None:
    """Returns the processes that the flags, or else the TPU slice, name; None for one process.

    Raises: ServerConfigError naming the flag, or what the slice says that makes no sense.
    """
    for name in ("join_timeout", "heartbeat_timeout"):
        if not 1.0 <= getattr(args, name) <= 86_400:
            raise ServerConfigError(f"--{name.replace('_', '-')} must be from 1 to 86400, got {getattr(args, name):g}")
    given = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return _find_slice(environ, dev)
    if args.num_processes is not None and args.num_processes < 1:
        raise ServerConfigError(f"--num-processes must be at least 1, got {args.num_processes}")
    if args.num_processes == 1 and args.process_id in (None, 0):
        return None
    if missing:
        raise ServerConfigError(
            f"many hosts need --coordinator, --num-processes and --process-id; missing: {', '.join(missing)}"
        )
    if not 0 <= args.process_id < args.num_processes:
        raise ServerConfigError(f"--process-id must be from 0 to {args.num_processes - 1}, got {args.process_id}")
    try:
        parse_address(args.coordinator)
    except ConfigError as error:
        raise ServerConfigError(f"--coordinator: {error}") from None
    return Hosts(args.coordinator, args.num_processes, args.process_id)


def _find_slice(environ: Mapping[str, str], dev: Path) -> Hosts | None:
    """Asks the environment (Kubernetes sets it), then, on a machine with TPU chips, Google Cloud's metadata server."""
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return None
    if environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        raise ServerConfigError(
            "several TPU slices are not detected: give --coordinator, --num-processes and --process-id"
        )
    workers, worker_id = environ.get("TPU_WORKER_HOSTNAMES"), environ.get("TPU_WORKER_ID")
    if workers is None and any([*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")]):
        workers, worker_id = _metadata(environ, "worker-network-endpoints"), _metadata(environ, "agent-worker-number")
    # An entry is an address, or name:id:address.
    hosts = [entry.strip().rpartition(":")[2] for entry in (workers or "").split(",") if entry.strip()]
    if len(hosts) < 2:
        return None
    if worker_id is None or not worker_id.isdigit() or int(worker_id) >= len(hosts):
        raise ServerConfigError(
            f"this TPU slice names {len(hosts)} hosts, and this one is number {worker_id!r}, expected 0 to "
            f"{len(hosts) - 1}. Give --coordinator, --num-processes and --process-id"
        )
    return Hosts(f"{hosts[0]}:{POD_PORT}", len(hosts), int(worker_id))


def _metadata(environ: Mapping[str, str], key: str) -> str | None:
    """Source: Compute Engine documentation, "View and query VM metadata"."""
    url = _METADATA.format(host=environ.get("GCE_METADATA_IP", "metadata.google.internal"), key=key)
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # No proxy: the server is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_METADATA_TIMEOUT_S) as response:
            text: str = response.read(1 << 20).decode()
            return text.strip()
    except (OSError, UnicodeDecodeError):
        return None
