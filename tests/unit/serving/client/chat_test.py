"""The terminal's chat: what it keeps, sends and shows."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time

import pytest
from jaxllama_serving.client.conversation import ChatError, Conversation
from jaxllama_serving.client.terminal import AnswerView, split_blocks
from rich.console import Console
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import serving_in_thread

from jaxllama.__main__ import main

ANSWER = "Title\n\nSome **bold** text.\n\n```\nx = 1\n\ny = 2\n```\n\n- a\n- b\n\nThe end."


def chat(monkeypatch, url: str, *lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return main(["chat", url])


def test_lines_are_asked_and_answered_in_plain_text(monkeypatch, capsys):
    with serving_in_thread(FakeLlama(["I think", END_THINK, ANSWER], starts_in_reasoning=True)) as url:
        assert chat(monkeypatch, url, "hello", "/think", "/quit", "never asked") == 0
    assert capsys.readouterr().out == f"{ANSWER}\nI think\n"


def test_what_is_sent_is_the_whole_conversation(monkeypatch, tmp_path):
    llama = FakeLlama(["yes"])
    saved = tmp_path / "c.json"
    with serving_in_thread(llama) as url:
        chat(monkeypatch, url, "/system Be brief.", "/set temperature 0.5", "one", "//two", "/retry", f"/save {saved}")
    value = json.loads(saved.read_text())
    assert value["system"] == "Be brief."
    assert value["settings"] == {"temperature": 0.5}
    assert [(m["role"], m["content"]) for m in value["messages"]] == [
        ("user", "one"),
        ("assistant", "yes"),
        ("user", "/two"),
        ("assistant", "yes"),
    ]
    assert len(llama.engine.prompts) == 3
    assert llama.engine.prompts[1] == llama.engine.prompts[2]
    assert len(llama.engine.prompts[0]) < len(llama.engine.prompts[1])


def test_a_refused_question_is_not_asked_again_with_the_next(monkeypatch, capsys):
    llama = FakeLlama(["yes"])
    with serving_in_thread(llama) as url:
        chat(monkeypatch, url, "/set temperature 9", "bad", "/set temperature", "good", "/bogus", "/save", "/set n 2")
    out = capsys.readouterr().out
    assert "temperature must be a number from 0 to 2, got 9" in out
    assert "/bogus is not a command" in out
    assert "/save needs FILE" in out
    assert "n cannot be set" in out
    assert len(llama.engine.prompts) == 1


def test_what_is_saved_is_loaded_again(tmp_path):
    talk = Conversation("m", "sys", {"top_p": 0.5, "stop": ["a"]})
    talk.ask("q")
    talk.answer("a", "because")
    talk.save(tmp_path / "talk.json")
    other = Conversation("n")
    other.load(tmp_path / "talk.json")
    assert other == Conversation("n", "sys", {"top_p": 0.5, "stop": ["a"]}, talk.messages)
    assert other.reasoning == "because"
    assert "because" not in json.dumps(other.body())
    talk.save(tmp_path / "talk.md")
    assert (
        tmp_path / "talk.md"
    ).read_text() == "**system**\n\nsys\n\n---\n\n**user**\n\nq\n\n---\n\n**assistant**\n\na\n"
    for text in ("", "[]", '{"messages": [{"role": "tool", "content": "x"}]}', '{"messages": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ChatError, match=r"bad\.json"):
            other.load(tmp_path / "bad.json")
    assert other.messages == talk.messages


def test_undo_and_retry_need_something_to_take_back():
    talk = Conversation("m")
    with pytest.raises(ChatError, match="nothing was asked"):
        talk.undo()
    talk.ask("q")
    talk.answer("a", "")
    talk.drop_answer()
    assert [message["role"] for message in talk.messages] == ["user"]
    talk.answer("b", "")
    talk.undo()
    assert talk.messages == []


@pytest.mark.parametrize("seed", range(20))
def test_blocks_add_up_and_are_never_cut_inside_a_fence(seed):
    text = f"{ANSWER}\n\n~~~py\n\n```\n\n~~~\n\n1. one\n\n2. two\n\nlast\n"
    rng, pending, shown = random.Random(seed), "", []
    at = 0
    while at < len(text):
        size = rng.randint(1, 12)
        stable, pending = split_blocks(pending + text[at : at + size])
        shown += [stable] if stable else []
        at += size
    assert "".join(shown) + pending == text
    for block in shown:
        assert block.count("```\n") % 2 == 0 or "~~~" in block
        assert block.count("~~~") % 2 == 0
    assert len(shown) > 2


@pytest.mark.parametrize("folds", [True, False])
def test_everything_is_on_the_screen_at_the_end(folds):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=12, color_system=None)
    with AnswerView(console, fold=folds) as view:
        for i in range(30):
            view.add(f"thought {i}\n", "")
        for at in range(0, len(ANSWER), 3):
            view.add("", ANSWER[at : at + 3])
    shown = console.file.getvalue()
    for text in ("Title", "bold", "y = 2", "The end."):
        assert text in shown
    assert ("thought for" in shown) == folds
    assert view.summary(12).startswith("12 tokens, ")


def test_ctrl_c_ends_an_answer_and_keeps_what_has_come(tmp_path):
    """In a terminal of its own, with real keys."""
    saved = tmp_path / "c.json"
    with serving_in_thread(FakeLlama(["again "], repeats=True, delay_s=0.02)) as url:
        near, far = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxllama", "chat", url],
            stdin=far, stdout=far, stderr=far, start_new_session=True, close_fds=True,
            env={**os.environ, "TERM": "xterm", "HOME": str(tmp_path)},
        )  # fmt: skip
        os.close(far)
        try:
            _read_until(near, b"/help")
            os.write(near, b"go on\r")
            _read_until(near, b"again again")
            os.killpg(process.pid, signal.SIGINT)
            _read_until(near, b"stopped; ")
            os.write(near, f"/save {saved}\r".encode())
            deadline = time.monotonic() + 20
            while not saved.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            os.write(near, b"\x04")
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(near)
    messages = json.loads(saved.read_text())["messages"]
    assert messages[1]["content"].startswith("again again")


def _read_until(near: int, text: bytes, timeout_s: float = 60.0) -> None:
    seen, deadline = b"", time.monotonic() + timeout_s
    while text not in seen:
        assert time.monotonic() < deadline, seen[-2000:]
        os.set_blocking(near, False)
        try:
            seen += os.read(near, 65536)
        except BlockingIOError:
            time.sleep(0.02)
