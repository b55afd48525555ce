"""`/tokenize` and `/detokenize`, `/version`, and the limits that `/v1/models` shows."""

from __future__ import annotations

import pytest
import tiny
from unit.serving.fakes import BOS, EOS, FakeLlama
from unit.serving.live import run, serving

from jaxllama import ChatTemplate


def post(path, status=200, **fields):
    async def test():
        async with serving(FakeLlama(["Hi", b"\xe2"])) as live:
            found, answer, _ = await live.post(path=path, json=fields)
            assert found == status, answer
            return answer

    return run(test())


@pytest.mark.parametrize("prefix", ["", "/v1", "/v1/openai"])
def test_text_and_messages_become_the_ids_that_the_routes_use(prefix):
    path = f"{prefix}/tokenize"
    assert post(path, prompt="abc") == {"count": 4, "max_model_len": 4096, "tokens": [BOS, 5, 5, 5]}
    assert post(path, prompt="abc", add_special_tokens=False, model="default")["tokens"] == [5, 5, 5]
    assert post(path, prompt="")["count"] == 1
    assert post(path, messages=[{"role": "user", "content": "Hi"}])["count"] == len("user: Hi\n")
    assert post(path, prompt="ab", return_token_strs=True)["token_strs"] == ["", "x", "x"]


@pytest.mark.parametrize("prefix", ["", "/v1", "/v1/openai"])
def test_ids_become_text(prefix):
    path = f"{prefix}/detokenize"
    assert post(path, tokens=[10, 5, 11]) == {"prompt": "Hix\ufffd", "count": 3}
    assert post(path, tokens=[]) == {"prompt": "", "count": 0}


def test_a_client_without_the_tokenizer_s_files_asks_for_names_and_ids():
    """As lm-eval's remote tokenizer does: `/tokenizer_info`, then `/tokenize` of the names it gives."""

    async def test():
        async with serving(FakeLlama()) as live:
            for prefix in ("", "/v1", "/v1/openai"):
                status, info, _ = await live.get(f"{prefix}/tokenizer_info")
                assert (status, info["eos_token"], info["eos_token_id"]) == (200, "<eos>", EOS)
                assert (info["bos_token"], info["pad_token"], info["model_max_length"]) == (None, None, 4096)

    run(test())
    assert post("/tokenize", prompt="<eos>", add_special_tokens=False)["tokens"] == [EOS]
    # Within a text, and where the text is a prompt, a spelling is no token.
    assert post("/tokenize", prompt=" <eos>", add_special_tokens=False)["tokens"] == [5] * 6
    assert post("/tokenize", prompt="<eos>")["tokens"] == [BOS] + [5] * 5


USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
CHATS = {
    "a message": {"messages": [USER]},
    "tools": {"messages": [USER], "tools": [TOOL]},
    "tools that are hidden": {"messages": [USER], "tools": [TOOL], "tool_choice": "none"},
    "a continued answer": {
        "messages": [USER, {"role": "assistant", "content": "He"}],
        "continue_final_message": True,
    },
    "no turn of the assistant": {"messages": [USER], "add_generation_prompt": False},
    "a variable of the template": {"messages": [USER], "chat_template_kwargs": {"tone": "in a very dry tone"}},
}


def test_what_forms_a_chats_prompt_forms_its_ids():
    async def test():
        llama = FakeLlama()
        llama.chat_template = ChatTemplate("{{ tone }}" + tiny.CHAT_TEMPLATE, spellings=())
        counts = {}
        async with serving(llama) as live:
            for name, fields in CHATS.items():
                status, ids, _ = await live.post(path="/tokenize", json=fields)
                assert status == 200, ids
                status, answer, _ = await live.post({**fields, "max_tokens": 1})
                assert status == 200, answer
                assert ids["count"] == len(ids["tokens"]) == answer["usage"]["prompt_tokens"]
                counts[name] = ids["count"]
        assert len(set(counts.values())) == len(counts) - 1
        assert counts["tools that are hidden"] == counts["a message"]

    run(test())


def test_a_variable_that_the_template_does_not_ask_for_is_named():
    async def test():
        fields = {"messages": [USER], "chat_template_kwargs": {"tone": "dry"}}
        async with serving(FakeLlama()) as live:
            status, _, headers = await live.post(path="/tokenize", json=fields)
            assert (status, headers["X-Jaxllama-Ignored"]) == (200, "chat_template_kwargs.tone")

    run(test())


BAD = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
    ("/tokenize", {"prompt": 1}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/tokenize", {"prompt": "a", "chat_template": "b"}, "chat_template"),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools[0].type"),
    ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools"),
    ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ("/tokenize", {"messages": [USER], "tools": [TOOL, TOOL]}, "tools"),
    ("/tokenize", {"messages": [USER], "tool_choice": "required"}, "tool_choice"),
    ("/tokenize", {"messages": [USER], "continue_final_message": True}, "continue_final_message"),
    ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
    ("/tokenize", {"messages": [USER], "documents": [{"text": "a"}]}, "documents"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [1000]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
    ("/detokenize", {"tokens": "1"}, "tokens"),
]


@pytest.mark.parametrize(("path", "fields", "param"), BAD)
def test_what_cannot_be_is_refused_by_name(path, fields, param):
    assert post(path, status=400, **fields)["error"]["param"] == param


def test_an_unknown_model_is_not_found():
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert post(path, status=404, model="gpt-4", **fields)["error"]["code"] == "model_not_found"


def test_an_answer_names_what_was_ignored():
    async def test():
        async with serving(FakeLlama()) as live:
            for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
                status, _, headers = await live.post(path=path, json={**fields, "foo": 1})
                assert (status, headers["X-Jaxllama-Ignored"]) == (200, "foo")

    run(test())


def test_version_and_models_tell_what_runs_and_its_limits():
    async def test():
        async with serving(None, price_input=0.5, request_timeout_s=9.0, max_n=4) as live:
            version = (await live.get("/version"))[1]
            assert version["system_fingerprint"] is None
            live.service.set_llama(FakeLlama())
            assert (await live.get("/v1/version"))[1]["version"] == version["version"]
            entry = (await live.get("/v1/models/org/model"))[1]
            assert entry["max_model_len"] == 4096
            assert entry["limits"] == {"max_n": 4, "max_body_bytes": 4 * 2**20, "request_timeout_s": 9.0}
            assert entry["pricing"] == {"input": 0.5, "output": 0.0}

    run(test())
