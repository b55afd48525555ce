"""litellm's proxy in front of this server, asked with the openai client that it brings."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

KEY = "sk-of-the-proxy"
START_TIMEOUT_S = 240.0
MESSAGES = [{"role": "user", "content": "Weather in 'Paris' for 3 days?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": PARAMETERS}}


@pytest.fixture(scope="session")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a proxy that knows this server under two providers."""
    folder = tmp_path_factory.mktemp("proxy")
    models = [
        {
            "model_name": provider,
            "litellm_params": {"model": f"{provider}/org/model", "api_base": f"{url}/v1/openai", "api_key": "none"},
        }
        for provider in ("deepinfra", "hosted_vllm")
    ]
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": KEY}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    with log.open("w") as output:
        # As its console script does.
        command = [
            sys.executable,
            "-c",
            "import litellm; litellm.run_server()",
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        proxy = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(f"http://127.0.0.1:{port}/health/liveliness", proxy, log)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60) as found:
            yield found
    finally:
        proxy.kill()
        proxy.wait()


def _wait(url: str, proxy: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and proxy.poll() is None:
        try:
            urllib.request.urlopen(url, None, 5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the proxy did not start: {log.read_text()[-1500:]}")


@pytest.fixture(params=["deepinfra", "hosted_vllm"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


def check_models(client):
    assert {model.id for model in client.models.list()} == {"deepinfra", "hosted_vllm"}


def check_an_answer(client, model):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0.2, max_tokens=80)
    assert answer.choices[0].message.content == "You said: Weather in 'Paris' for 3 days?"
    assert answer.usage.total_tokens > 0


def check_a_stream(client, model):
    chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "You said: Weather in 'Paris' for 3 days?"


@pytest.mark.parametrize("stream", [False, True])
def check_a_tool(client, model, stream):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, tools=[WEATHER], stream=stream)
    if stream:
        calls = [call for chunk in answer for choice in chunk.choices for call in choice.delta.tool_calls or []]
        name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert (name, json.loads(arguments)) == ("weather", {"city": "Paris", "days": 3})


def check_an_error_keeps_its_status(client, model):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=9)
