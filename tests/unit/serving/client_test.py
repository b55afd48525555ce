"""The official `openai` client, unchanged but for its base_url, against the server with a fake model."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from unit.serving import client_script
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import serving_in_thread

MESSAGES = [{"role": "user", "content": "Hi"}]


def client_of(url, prefix="/v1/openai", key="none"):
    return openai.OpenAI(base_url=url + prefix, api_key=key, max_retries=0, timeout=10)


def ask(client, **fields):
    return client.chat.completions.create(model="default", messages=MESSAGES, **fields)


@pytest.fixture(scope="module")
def url():
    with serving_in_thread(FakeLlama(["Paris", " is", " nice", "."], delay_s=0.002)) as found:
        yield found


@pytest.mark.parametrize("prefix", ["/v1", "/v1/openai"])
def test_answers_and_streams_agree(url, prefix):
    with client_of(url, prefix) as client:
        whole = ask(client, temperature=0, seed=3, n=1, logprobs=False, stop=None)
        assert whole.choices[0].message.content == "Paris is nice."
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens == 5
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris is nice."
        assert chunks[-1].usage == whole.usage
        assert [m.id for m in client.models.list()] == ["default", "org/model"]
        assert client.models.retrieve("org/model").id == "org/model"


def test_sixteen_threads_with_different_parameters(url):
    def one(i):
        with client_of(url) as client:
            chunks = ask(client, stream=True, max_tokens=i % 5, temperature=i / 16, top_p=1 - i / 20, seed=i)
            return "".join(c.choices[0].delta.content or "" for c in chunks)

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(one, range(16)))
    assert texts == ["".join(["Paris", " is", " nice", "."][: i % 5]) for i in range(16)]


def test_reasoning_is_where_clients_look_for_it():
    llama = FakeLlama(["Hm", "\n", END_THINK, "\n\n", "Yes"], starts_in_reasoning=True)
    with serving_in_thread(llama) as url, client_of(url) as client:
        message = ask(client).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm", "Yes")
        deltas = [c.choices[0].delta for c in ask(client, stream=True)]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm"


def test_errors_are_the_clients_own_exceptions(url):
    with client_of(url) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            ask(client, temperature=3)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="chat_template"):
            ask(client, extra_body={"chat_template": "x"})
    with serving_in_thread(FakeLlama(), api_keys=("sk-right",)) as closed:
        with client_of(closed, key="sk-wrong") as client, pytest.raises(openai.AuthenticationError):
            ask(client)
        with client_of(closed, key="sk-right") as client:
            assert ask(client).choices[0].message.content == "Hello world!"
    failing = FakeLlama(fail_after=2, failure=RuntimeError(), delay_s=0.01)
    with serving_in_thread(failing) as broken, client_of(broken) as client:
        with pytest.raises(openai.APIError, match="failed on this request"):
            list(ask(client, stream=True))
        with pytest.raises(openai.InternalServerError):
            ask(client)


def test_every_field_goes_through_the_client(url):
    client_script.main(url)


@pytest.mark.slow
def test_every_field_goes_through_a_client_of_a_year_ago(url, tmp_path):
    """In an environment of its own, from the package index."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), "openai==2.8.1"]
    subprocess.run(install, check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, client_script.__file__, url],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "openai 2.8.1: all well" in done.stdout
