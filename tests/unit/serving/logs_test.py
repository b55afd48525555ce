"""Logs as JSON: one object a line, what a record is about as fields, and no message of an error."""

from __future__ import annotations

import io
import json
import logging

import pytest
from jaxllama_serving.process.logs import JsonFormatter, set_up_logging


@pytest.fixture
def stream():
    logger = logging.getLogger("jaxllama")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers = [logging.StreamHandler(stream := io.StringIO())]
    yield stream
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


def test_a_record_is_one_object_with_its_fields(stream):
    set_up_logging("info", "json")
    logging.getLogger("jaxllama.serving").info("%s took\n%d", "it", 3, extra={"request_id": "req_1", "status": None})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "info",
        "logger": "jaxllama.serving",
        "message": "it took\n3",
        "request_id": "req_1",
        "status": None,
    }


def test_a_second_call_changes_level_and_format(stream):
    set_up_logging("warning", "json")
    set_up_logging("info", "text")
    logging.getLogger("jaxllama.serving").info("hello")
    assert stream.getvalue().endswith(" INFO hello\n")


def test_an_error_is_named_and_not_quoted():
    prompt = "se" + "cret"
    try:
        raise ValueError(prompt)
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": (type(error), error, error.__traceback__)})
    line = JsonFormatter().format(record)
    assert json.loads(line)["error"] == "ValueError"
    assert "an_error_is_named" in json.loads(line)["traceback"]
    assert "secret" not in line
