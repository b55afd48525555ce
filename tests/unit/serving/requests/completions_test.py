"""Text completions: every form of prompt, echo, logprobs in lists, the best of many, and streams of all that."""

from __future__ import annotations

import pytest
from unit.serving.fakes import BOS, FakeLlama
from unit.serving.live import parse_events, run, serving
from unit.serving.requests.chat_test import CASES, SPLIT, WORDS

PATH = "/v1/completions"


def request(**fields):
    return {"model": "default", "prompt": "Once", **fields}


def completion_of(llama, *, status=200, config=None, path=PATH, **fields):
    async def test():
        async with serving(llama, **(config or {})) as live:
            found, answer, _ = await live.post(path=path, json=request(**fields))
            assert found == status, answer
            return answer

    return run(test())


def events_of(llama, **fields):
    async def test():
        body = request(stream=True, **fields)
        async with serving(llama) as live, live.session.post(live.url + PATH, json=body) as response:
            assert response.status == 200, await response.text()
            return parse_events(await response.text())

    return run(test())


def joined(events, index=0):
    """The choice that a stream's chunks add up to."""
    found = {"text": "", "finish_reason": None}
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            found["text"] += choice["text"]
            for name in ("finish_reason", "stop_reason", "seed", "prompt_token_ids"):
                found[name] = choice.get(name) if choice.get(name) is not None else found.get(name)
            found["token_ids"] = found.get("token_ids", []) + choice.get("token_ids", [])
            for name, values in (choice["logprobs"] or {}).items():
                lists = found.setdefault("logprobs", {})
                lists[name] = lists.get(name, []) + values
    return found


@pytest.mark.parametrize("path", [PATH, "/v1/openai/completions"])
def test_an_answer_has_every_field_of_the_contract(path):
    answer = completion_of(FakeLlama(WORDS), path=path, seed=7)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", "default", 7)
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "The capital of France is Paris.",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 8


PROMPTS = {
    "a string": ("abc", [[BOS, 5, 5, 5]]),
    "strings": (["a", "bc"], [[BOS, 5], [BOS, 5, 5]]),
    "ids": ([7, 8, 9], [[7, 8, 9]]),
    "lists of ids": ([[7], [8, 9]], [[7], [8, 9]]),
    "an empty string": ("", [[BOS]]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_form_of_prompt_reaches_the_engine(name):
    prompt, rows = PROMPTS[name]
    llama = FakeLlama()
    answer = completion_of(llama, prompt=prompt, n=2)
    assert llama.engine.prompts == [ids for ids in rows for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(rows)))
    # A prompt counts once, however many completions it has.
    assert answer["usage"]["prompt_tokens"] == sum(map(len, rows))
    assert len({row.seed for row in llama.engine.rows}) == 2 * len(rows)


BAD = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1000]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ({"prompt": "x" * 5000}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"messages": []}, "messages"),
    ({"top_logprobs": 3}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_name(fields, param):
    llama = FakeLlama()
    assert completion_of(llama, status=400, **fields)["error"]["param"] == param
    assert llama.engine.rows == []


def test_sixteen_tokens_are_the_default_and_the_server_bounds_best_of():
    llama = FakeLlama(["a"], repeats=True)
    answer = completion_of(llama)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    for fields in ({"n": 3}, {"best_of": 3}):
        assert completion_of(FakeLlama(), status=400, config={"max_n": 2}, **fields)["error"]["param"] in fields


def test_logprobs_are_four_lists_of_one_length():
    llama = FakeLlama(["Hi", b"\xe2", b"\x82\xac", "!"])
    ids = llama.tokenizer.ids_of(["Hi", b"\xe2", b"\x82\xac", "!"])
    lists = completion_of(llama, logprobs=1)["choices"][0]["logprobs"]
    assert lists["tokens"] == ["Hi", "bytes:\\xe2", "bytes:\\x82\\xac", "!"]
    assert lists["token_logprobs"] == [-float(i) for i in ids]
    # Of the likeliest one, and the token itself.
    assert [len(top) for top in lists["top_logprobs"]] == [2] * 4
    assert lists["text_offset"] == [0, 2, 2, 3]
    assert completion_of(FakeLlama())["choices"][0]["logprobs"] is None
    none = completion_of(FakeLlama(["Hi"]), logprobs=0)["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{"Hi": none["token_logprobs"][0]}]


def test_echo_gives_the_prompt_its_logprobs_and_offsets():
    choice = completion_of(FakeLlama(["!"]), prompt="ab", echo=True, logprobs=2)["choices"][0]
    assert choice["text"] == "ab!"
    lists = choice["logprobs"]
    assert lists["tokens"] == ["", "x", "x", "!", ""]
    assert lists["token_logprobs"] == [None, -1.0, -2.0, -10.0, 0.0]
    assert lists["top_logprobs"][0] is None
    assert lists["text_offset"] == [0, 0, 1, 2, 3]
    scored = completion_of(FakeLlama(["!"]), prompt="ab", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert (scored["text"], scored["logprobs"]["token_logprobs"]) == ("ab", [None, -1.0, -2.0])
    assert completion_of(FakeLlama(["!"]), prompt=[5, 10], echo=True)["choices"][0]["text"] == "x!!"
    llama = FakeLlama(["!"])
    plain = completion_of(llama, prompt="ab", echo=True)["choices"][0]
    assert (plain["text"], plain["logprobs"], llama.num_scored) == ("ab!", None, 0)


def test_an_echo_tells_the_stop_token_too():
    """lm-eval's log-likelihoods: it drops the last entry as the generated token's, which a missing one would shift."""
    fields = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    for pieces in ([], ["!"]):
        lists = completion_of(FakeLlama(pieces), **fields)["choices"][0]["logprobs"]
        assert {name: len(values) for name, values in lists.items()} == dict.fromkeys(lists, 4)
        assert lists["token_logprobs"][:3] == [None, -1.0, -2.0]
        assert joined(events_of(FakeLlama(pieces), **fields))["logprobs"] == lists
    # What is no echo has an entry for each token with text.
    lists = completion_of(FakeLlama(["!"]), prompt="ab", logprobs=1)["choices"][0]["logprobs"]
    assert lists["tokens"] == ["!"]


def test_prompt_logprobs_and_token_ids_are_each_choice_s():
    fields = {"prompt": ["a", "bc"], "prompt_logprobs": 1, "return_token_ids": True, "return_seed": True}
    llama = FakeLlama(["!"])
    answer = completion_of(llama, **fields)
    for choice, ids, row in zip(answer["choices"], ([BOS, 5], [BOS, 5, 5]), llama.engine.rows, strict=True):
        assert choice["prompt_token_ids"] == ids
        assert len(choice["prompt_logprobs"]) == len(ids)
        assert choice["token_ids"] == [10, 0]
        assert choice["seed"] == row.seed


def test_a_stream_that_waits_for_scores_is_kept_alive():
    llama = FakeLlama(["!"])
    llama.score_delay_s = 0.05

    async def test():
        fields = request(stream=True, prompt="abcdef", echo=True, logprobs=0)
        alive = serving(llama, sse_keepalive_s=0.1)
        async with alive as live, live.session.post(live.url + PATH, json=fields) as response:
            text = await response.text()
        assert text.startswith(": keep-alive\n\n")
        assert joined(parse_events(text))["text"] == "abcdef!"

    run(test())


def test_echo_shows_only_as_many_alternatives_as_each_field_asks_for():
    answer = completion_of(FakeLlama(["!"]), prompt="ab", echo=True, logprobs=1, prompt_logprobs=3)
    choice = answer["choices"][0]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:-1]] == [2, 2, 2]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [4, 4]


def test_the_best_are_those_with_the_likeliest_tokens():
    llama = FakeLlama(delay_s=0.001)
    llama.set_scripts(["bad"], ["good", "good"], ["fair"], ["worst"])
    bad, good, fair, worst = llama.tokenizer.ids_of(["bad", "good", "fair", "worst"])
    llama.engine.logprobs = {bad: -5, good: -1, fair: -2, worst: -9}
    answer = completion_of(llama, best_of=4, n=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "goodgood"), (1, "fair")]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    # All that was drawn is paid for.
    assert answer["usage"]["completion_tokens"] == 2 + 3 + 2 + 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] is None])
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_answer_in_one_piece(name, batch, echo):
    pieces, fields, _ = CASES[name]
    fields = {"prompt": ["ab", "c"], "logprobs": 2, "return_token_ids": True, "seed": 3, "echo": echo} | fields
    whole = completion_of(FakeLlama(pieces, batch=batch), return_seed=True, **fields)
    events = events_of(
        FakeLlama(pieces, batch=batch), return_seed=True, stream_options={"include_usage": True}, **fields
    )
    for choice in whole["choices"]:
        found = joined(events, choice["index"])
        empty = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        assert {"stop_reason": None, "logprobs": empty} | found == {k: v for k, v in choice.items() if k != "index"}
    assert events[-1] == "[DONE]"
    assert (events[-2]["choices"], events[-2]["usage"]) == ([], whole["usage"])


def test_characters_are_never_split_and_each_choice_ends_once():
    events = events_of(FakeLlama(SPLIT), prompt=["a", "b"], n=2)
    assert not any("\ufffd" in choice["text"] for chunk in events[:-1] for choice in chunk["choices"])
    ends = [c["index"] for chunk in events[:-1] for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]
