"""What the server writes on stderr: lines for people, or JSON for what collects logs."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

LOG_FORMATS = ("text", "json")
# What every record has; anything else was given as `extra` by whoever logged, and is a field of its own.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Has jaxllama's loggers write from `level` on, in one of `LOG_FORMATS`. A second call changes both."""
    # Our own logger, not the root: libraries have given that one a handler and a level by now.
    logger = logging.getLogger("jaxllama")
    logger.setLevel(level.upper())
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.propagate = False
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in logger.handlers:
        handler.setFormatter(JsonFormatter() if log_format == "json" else text)


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, and what the record is about."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON on one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info and record.exc_info[0] is not None:
            # The error's own message is left out, as everywhere in logs: it may quote a prompt.
            fields["error"] = record.exc_info[0].__name__
            fields["traceback"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(fields, ensure_ascii=False, default=str)
