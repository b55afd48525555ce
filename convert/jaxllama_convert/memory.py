"""How much memory this process has used at most."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.platform != "win32":
    import resource


def peak_ram_bytes() -> int:
    """The largest resident set of this process so far, in bytes; 0 where the system does not say (Windows).

    Linux keeps getrusage's figure across exec, so a small process started by a large one looks large: the kernel's
    per-program high-water mark is preferred.
    """
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
