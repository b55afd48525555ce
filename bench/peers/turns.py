"""A contender that waits for its turns, in a process of its own: a line of JSON in, a line out.

In: `{"what": "decode", "rows": 16, "steps": 32}` or `{"what": "prefill", "tokens": 512}`. Out: seconds. First of all it
says who it is, once it is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

PROMPT_TOKENS = 32


def take_turns(name: str, versions: Mapping[str, str], turn: Callable[[dict[str, Any]], float]) -> None:
    """Until stdin ends."""
    print(json.dumps({"name": name, "versions": dict(versions)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(json.loads(line))), flush=True)
