"""The process: flags, keys, the port, signals and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from jaxllama_serving.config import ServerConfig, ServerConfigError
from jaxllama_serving.http.auth import read_keys
from jaxllama_serving.process import cli

TESTS = Path(__file__).parents[2]
SERVER = f"""
import sys, threading, time
sys.path.insert(0, {str(TESTS)!r})
from unit.serving.fakes import FakeLlama
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.process.server import serve
def load():
    time.sleep(float(sys.argv[1]))
    llama = FakeLlama(["a"] * int(sys.argv[2]), delay_s=0.05)
    def hang():
        llama.engine.hangs, llama.engine.unhealthy = True, "device 3 (TPU v6 lite) does not answer, on host x."
        llama.close = lambda: time.sleep(100)
    def fail():
        llama.engine.failed, llama.engine.unhealthy = True, "a program failed"
        llama.engine.failure, llama.engine.fail_after = RuntimeError(), 0
    if sys.argv[4] != "never":
        threading.Timer(1.0, hang if "hang" in sys.argv[4] else fail).start()
    return llama
config = ServerConfig(
    ("default",), port=0, drain_timeout_s=float(sys.argv[3]), exit_on_engine_failure=sys.argv[4] == "exit",
    exit_on_device_hang=sys.argv[4] == "hang"
)
sys.exit(serve(config, load))
"""


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """`cli.run` sets up the process's logging; here the process is the tests'."""
    logger = logging.getLogger("jaxllama")
    before = (logger.level, list(logger.handlers), logger.propagate)
    yield
    logger.setLevel(before[0])
    logger.handlers, logger.propagate = before[1:]


class Process:
    """A server in a process of its own, and what it prints."""

    def __init__(self, load_s=0.0, tokens=20, drain_s=10.0, fails="never"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(load_s), str(tokens), str(drain_s), fails],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    def read_until(self, start):
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return line
        raise AssertionError(f"no line begins with {start!r}: {self.lines}")

    def signal(self):
        self.process.send_signal(signal.SIGTERM)

    def code(self, timeout_s=60):
        return self.process.wait(timeout_s)


def fetch(url, fields=None):
    data = (
        json.dumps({"model": "default", "messages": [{"role": "user", "content": "x"}], **fields}) if fields else None
    )
    request = urllib.request.Request(url, data.encode() if data else None, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_sigterm_finishes_what_runs_refuses_the_rest_and_exits_0():
    with Process() as server:
        url = server.read_until("Ready in").split(": ")[1].split()[0]
        assert server.read_until("curl ").startswith(f"curl {url}/v1/openai/chat/completions")
        results = []
        thread = threading.Thread(target=lambda: results.append(fetch(url + "/v1/chat/completions", {"stream": True})))
        thread.start()
        time.sleep(0.4)
        server.signal()
        server.read_until("Draining")
        assert fetch(url + "/ready")[0] == 503
        assert fetch(url + "/health")[0] == 200
        assert fetch(url + "/v1/chat/completions", {"n": 1})[0] == 503
        thread.join(10)
        assert results[0][0] == 200
        assert results[0][1].endswith("data: [DONE]\n\n")
        assert results[0][1].count('"content":"a"') == 20
        assert server.code() == 0


def test_a_second_sigterm_exits_at_once():
    with Process(tokens=10_000, drain_s=60) as server:
        url = server.read_until("Ready in").split(": ")[1].split()[0]
        with urllib.request.urlopen(
            urllib.request.Request(
                url + "/v1/chat/completions",
                json.dumps(
                    {"model": "default", "messages": [{"role": "user", "content": "x"}], "stream": True}
                ).encode(),
                {"Content-Type": "application/json"},
            ),
            timeout=10,
        ) as response:
            response.readline()
            server.signal()
            server.read_until("Draining")
            time.sleep(0.2)
            assert server.process.poll() is None
            server.signal()
            assert server.code(3) == 1


def test_it_answers_while_it_loads_and_a_signal_then_exits_0():
    with Process(load_s=30) as server:
        url = server.read_until("Loading").split(". ")[1].split("/health")[0]
        assert fetch(url + "/health")[0] == 200
        status, answer = fetch(url + "/ready")
        assert (status, json.loads(answer)["error"]["type"]) == (503, "service_unavailable")
        server.signal()
        assert server.code(3) == 0


def test_a_failed_engine_ends_the_process_only_if_asked():
    with Process(tokens=10_000, fails="exit") as server:
        url = server.read_until("Ready in").split(": ")[1].split()[0]
        status, text = fetch(url + "/v1/chat/completions", {"stream": True})
        assert (status, '"server_error"' in text) == (200, True)
        server.read_until("The engine is not healthy: a program failed")
        assert server.code() == 1
    with Process(fails="stay") as server:
        url = server.read_until("Ready in").split(": ")[1].split()[0]
        time.sleep(2.0)
        assert (fetch(url + "/health")[0], fetch(url + "/version")[0]) == (503, 200)
        server.signal()
        assert server.code() == 0


def test_a_device_that_hangs_ends_the_process_only_if_asked():
    """Though the engine cannot be closed."""
    with Process(tokens=10_000, fails="hang") as server:
        url = server.read_until("Ready in").split(": ")[1].split()[0]
        status, text = fetch(url + "/v1/chat/completions", {"stream": True})
        assert (status, "service_unavailable" in text) == (200, True)
        line = server.read_until("The engine is not healthy: device 3 (TPU v6 lite) does not answer, on host x.")
        assert "(--exit-on-device-hang)" in line
        assert server.code() == 1
    with Process(fails="hang, and stay") as server:
        url = server.read_until("Ready in").split(": ")[1].split()[0]
        time.sleep(2.0)
        status, text = fetch(url + "/health")
        assert (status, "device 3" in text, fetch(url + "/version")[0]) == (503, True, 200)
        assert server.process.poll() is None


def parse(*flags):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args([*flags])


def test_flags_make_one_config(tmp_path):
    assert cli.make_config(parse(str(tmp_path)), None) == ServerConfig((tmp_path.name,))
    flags = "ckpt --served-model-name default org/model --port 0 --price-input 0.59 --price-output 0.79 --max-n 4"
    flags += " --strict-length --stop-in-reasoning --generation-config auto --request-timeout 60 --drain-timeout 5"
    flags += " --strict-fields"
    flags += " --peak-bandwidth 819 --exit-on-engine-failure --exit-on-device-hang"
    config = cli.make_config(parse(*flags.split(), "--cors-origin", "https://a.example"), "k1, k2")
    assert config == ServerConfig(
        ("default", "org/model"),
        port=0,
        api_keys=("k1", "k2"),
        cors_origins=("https://a.example",),
        price_input=0.59,
        price_output=0.79,
        max_n=4,
        strict_fields=True,
        strict_length=True,
        stop_in_reasoning=True,
        generation_config="auto",
        request_timeout_s=60,
        drain_timeout_s=5,
        peak_bandwidth=819,
        exit_on_engine_failure=True,
        exit_on_device_hang=True,
    )
    assert "k1" not in repr(config)


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--max-n", "17"],
        ["--cors-origin", "*"],
        ["--request-timeout", "0"],
        ["--request-timeout", "nan"],
        ["--price-input", "-1"],
        ["--peak-bandwidth", "0"],
        ["--api-key-file", "/nowhere/keys"],
        ["--served-model-name", "a\nb"],
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(flags, capsys):
    assert cli.run(parse("ckpt", *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxllama serve: ")
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line_and_exit_2(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(parse("ckpt", "--port", str(port))) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in error
    assert "in use" in error


def test_a_missing_checkpoint_is_one_line_and_exit_2(capsys, tmp_path):
    assert cli.run(parse(str(tmp_path / "nothing"), "--port", "0")) == 2
    assert "nothing" in capsys.readouterr().err


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-a\n\n  sk-ü  \n", "utf-8")
    assert read_keys(file, "sk-c,,sk-d ") == ("sk-a", "sk-ü", "sk-c", "sk-d")
    assert read_keys(None, None) == ()
    file.write_text("# nothing\n")
    for source in ((file, None), (None, " , "), (tmp_path, None)):
        with pytest.raises(ServerConfigError):
            read_keys(*source)


def test_help_needs_no_http_library():
    code = "import sys; sys.modules['aiohttp'] = sys.modules['pydantic'] = None\n"
    code += "import argparse; from jaxllama_serving.process import cli\n"
    code += "p = argparse.ArgumentParser(); cli.add_arguments(p); print(p.format_help())\n"
    code += "sys.exit(cli.run(p.parse_args(['ckpt'])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    for group in ("network:", "model and engine:", "API behaviour:", "access:", "operation:", "limits and timeouts"):
        assert group in done.stdout
    assert "jaxllama[serve]" in done.stderr
