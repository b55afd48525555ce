"""The chat page in Chromium, around a model that says what a test scripts: every flow, policy and accessibility.

`SCREENSHOTS=folder` keeps a picture of each state, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import serving_in_thread

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the dev extra has it")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]

REPLY = ["Hello", ", ", "**wor", "ld**", "!"]
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A page, what its console said, and the few things that all tests do with it."""

    def __init__(self, browser: Any, llama: FakeLlama, url: str, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **context)
        self.context.set_default_timeout(5000)
        self.page = self.context.new_page()
        self.llama, self.url, self.problems = llama, url, []
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)
        self.connected()

    def connected(self) -> None:
        sync_api.expect(self.page.locator("#model")).to_have_value("default")

    def ask(self, text: str) -> None:
        self.page.locator("#prompt").fill(text)
        self.page.keyboard.press("Enter")
        self.answered()

    def answered(self) -> None:
        self.page.locator("body:not(.busy) .turn.assistant:not([aria-busy])").last.wait_for()

    def turns(self) -> list[str]:
        """What is in the bubbles and answers."""
        return self.page.locator(".bubble, .turn.assistant .text").evaluate_all(
            "nodes => nodes.map(node => node.innerText.replace(/^You:\\s*/, '').trim())"
        )

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def sent(self) -> list[dict[str, Any]]:
        """The messages of the last request, as the template got them."""
        assert self.llama.chat_template is not None
        return self.llama.chat_template.seen[-1]

    def picture(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def check(self) -> None:
        """No violation that axe finds, and no word in the console."""
        found = axe.Axe().run(self.page).response["violations"]
        assert not [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]
        assert not self.problems


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Page]:
    options = getattr(request, "param", {})
    llama = FakeLlama(options.get("pieces", REPLY), **options.get("llama", {}))
    with serving_in_thread(llama, **options.get("server", {})) as url:
        page = Page(browser, llama, url, **options.get("context", {}))
        yield page
        page.context.close()


def test_a_chat_is_kept_and_found_again(page):
    page.ask("First question")
    assert page.turns() == ["First question", "Hello, world!"]
    assert page.page.locator(".text strong").inner_text() == "world"
    page.press("New chat")
    page.ask("Another matter")
    page.picture("chats")
    page.page.reload()
    page.page.locator(".chat .open").first.wait_for()
    assert page.page.locator(".chat .open").all_inner_texts() == ["Another matter", "First question"]
    page.page.locator("#find").fill("first")
    assert page.page.locator(".chat .open").all_inner_texts() == ["First question"]
    page.page.locator(".chat .open").click()
    assert page.turns() == ["First question", "Hello, world!"]
    page.ask("And then?")
    assert [message["content"] for message in page.sent()] == ["First question", "Hello, **world**!", "And then?"]
    page.check()


def test_a_chat_is_renamed_exported_deleted_and_imported(page, tmp_path):
    page.ask("Keep me")
    page.press("Rename this chat")
    page.page.keyboard.type("Mine")
    page.page.keyboard.press("Enter")
    page.page.get_by_role("button", name="Mine").wait_for()
    with page.page.expect_download() as download:
        page.press("Export this chat")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "Mine.json"
    assert [chat["title"] for chat in json.loads(path.read_text())["chats"]] == ["Mine"]
    page.page.on("dialog", lambda dialog: dialog.accept())
    page.press("Delete this chat")
    page.page.get_by_text("Chats are kept in this browser.", exact=True).wait_for()
    assert page.turns() == []
    page.page.locator("#import").set_input_files(path)
    page.page.get_by_text("One chat was imported.").first.wait_for()
    assert page.turns() == ["Keep me", "Hello, world!"]
    for bad in ("no json", "{}", json.dumps({"format": "jaxllama-chats", "chats": [{"nodes": {"a": {}}}]})):
        path.write_text(bad)
        page.page.locator("#import").set_input_files(path)
        page.page.locator("#notice").get_by_text("this file", exact=False).wait_for()
    page.check()


def test_edits_and_retries_are_branches(page):
    page.llama.set_scripts(["one"], ["two"], ["three"])
    page.ask("Count")
    page.press("Retry")
    page.answered()
    assert page.turns() == ["Count", "two"]
    page.press("Previous branch")
    assert page.turns() == ["Count", "one"]
    page.press("Edit")
    page.page.get_by_label("Edit your message").fill("Count on")
    page.page.keyboard.press("Enter")
    page.answered()
    assert page.turns() == ["Count on", "three"]
    assert [message["content"] for message in page.sent()] == ["Count on"]
    page.page.get_by_role("group", name="Branches of this message").get_by_label("Previous branch").click()
    assert page.turns() == ["Count", "one"]
    page.picture("branches")
    page.page.reload()
    page.page.locator(".chat .open").click()
    assert page.turns() == ["Count", "one"]
    page.check()


def test_a_text_file_is_attached_and_other_files_are_not(page, tmp_path):
    (tmp_path / "notes.md").write_text("a ``` fence\nline two\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    page.page.locator("#attach").set_input_files([tmp_path / "notes.md", tmp_path / "image.png"])
    page.page.locator("#notice").get_by_text("image.png was not attached").wait_for()
    assert page.page.locator("#attached li").count() == 1
    page.ask("Sum this up")
    assert page.sent()[0]["content"] == "Sum this up\n\nnotes.md:\n````\na ``` fence\nline two\n````"
    assert page.page.locator(".files summary").inner_text() == "notes.md, 21 characters"
    assert page.page.locator("#attached").is_hidden()
    page.check()


@pytest.mark.parametrize(
    "page", [{"pieces": ["The", " cat", " sat"], "llama": {"logprobs": {10: -0.05, 11: -1.0, 12: -4.0}}}], indirect=True
)
def test_tokens_show_their_probabilities_and_one_is_gone_on_from(page):
    page.page.get_by_label("Token probabilities").check()
    page.ask("Tell")
    page.press("Tokens")
    tokens = page.page.locator(".token")
    assert tokens.all_inner_texts() == ["The", " cat", " sat"]
    assert [each.split()[1] for each in tokens.evaluate_all("nodes => nodes.map(n => n.className)")] == [
        "sure",
        "open",
        "rare",
    ]
    assert "“ cat” 36.8 %" in tokens.nth(1).get_attribute("title")
    tokens.nth(0).focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    page.page.get_by_text("Token 2 of 3: “ cat”, 36.8 %").wait_for()
    page.picture("tokens")
    page.check()
    # Token 20 is likeliest in the fake, and has no text; its first real alternative continues.
    choice = page.page.locator(".alternatives button:enabled").first
    choice.click()
    page.answered()
    assert page.sent()[-1]["role"] == "assistant"
    assert page.sent()[-1]["content"].startswith("The")
    assert page.turns()[-1].startswith("The")
    assert page.page.get_by_role("group", name="Branches of this answer").inner_text().split() == [
        "‹",
        "2",
        "of",
        "2",
        "›",
    ]
    assert not page.problems


def test_a_tool_is_tried_out_by_hand(page):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    page.llama.set_scripts([call], ["Sunny."])
    page.page.get_by_label("Tools", exact=True).fill(json.dumps(WEATHER))
    page.ask("Weather in Oslo?")
    assert page.page.locator(".call code").inner_text() == "weather"
    page.picture("tools")
    page.check()
    page.page.get_by_label("Result of weather").fill("12 degrees")
    page.press("Send the result")
    page.answered()
    assert page.turns()[-1] == "Sunny."
    assert "12 degrees" in page.sent()[-1]["content"]
    assert page.page.locator(".call textarea").count() == 0
    page.check()


def test_bad_json_in_the_settings_is_said_before_anything_is_sent(page):
    page.page.get_by_label("Schema of the answer").fill('{"type": ')
    page.page.locator("#prompt").fill("Hi")
    page.page.keyboard.press("Enter")
    page.page.locator("#notice").get_by_text("not JSON").wait_for()
    assert page.page.locator("#prompt").input_value() == "Hi"
    assert page.page.locator("#schema").get_attribute("aria-invalid") == "true"
    assert not page.llama.engine.rows
    page.check()


def test_a_schema_is_sent_as_the_response_format(page):
    page.page.get_by_label("Schema of the answer").fill('{"type": "object"}')
    with page.page.expect_request("**/v1/chat/completions") as request:
        page.page.locator("#prompt").fill("Hi")
        page.page.keyboard.press("Enter")
    assert request.value.post_data_json["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    "page",
    [{"pieces": ["hm", "m", END_THINK, "Yes", "."], "llama": {"starts_in_reasoning": True, "delay_s": 0.05}}],
    indirect=True,
)
def test_thinking_is_folded_and_timed(page):
    page.ask("Why?")
    assert page.turns()[-1] == "Yes."
    assert page.page.locator(".reasoning summary").inner_text().startswith("Thought for ")
    assert page.page.locator(".reasoning .inner").is_hidden()
    page.page.locator(".reasoning summary").click()
    assert page.page.locator(".reasoning .inner").inner_text() == "hmm"
    page.check()


def test_the_context_used_is_shown(page):
    page.ask("Hi")
    text = page.page.locator("#context-text").inner_text()
    used = int(text.split()[0])
    assert text == f"{used} of 4,096 tokens of context"
    assert used > len(REPLY)


@pytest.mark.parametrize("page", [{"llama": {"repeats": True, "delay_s": 0.02}}], indirect=True)
def test_an_answer_is_stopped_and_its_row_freed(page):
    page.page.locator("#prompt").fill("On and on")
    page.page.keyboard.press("Enter")
    page.page.locator(".text strong").first.wait_for()
    page.page.keyboard.press("Escape")
    page.answered()
    assert page.page.locator(".stats .note").inner_text() == "stopped"
    page.page.wait_for_timeout(1000)
    assert page.llama.engine.num_running == 0
    assert not page.problems


HOSTILE = [
    "<img src=x onerror=alert(1)> <script>alert(2)</script>\n\n[click](javascript:alert(3)) ",
    '[data](data:text/html,x) <a href="javascript:alert(4)">a</a>\n\n```html\n<b>x</b>\n```\n',
]


@pytest.mark.parametrize("page", [{"pieces": HOSTILE}], indirect=True)
def test_what_a_model_writes_is_text(page):
    page.page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    page.ask("Attack")
    answer = page.page.locator(".turn.assistant .text")
    assert answer.locator("img, script, b, a").count() == 0
    assert "<script>alert(2)</script>" in answer.inner_text()
    assert answer.locator(".code code").inner_text() == "<b>x</b>"
    page.check()


def test_a_key_is_asked_for_and_not_kept_on_the_disk(browser):
    llama = FakeLlama(REPLY)
    with serving_in_thread(llama, api_keys=("secret",)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.locator("#api-key").fill("secret")
        page.keyboard.press("Tab")
        sync_api.expect(page.locator("#model")).to_have_value("default")
        page.locator("#prompt").fill("Hi")
        page.keyboard.press("Enter")
        page.locator(".turn.assistant:not([aria-busy])").wait_for()
        assert "secret" not in page.evaluate("() => JSON.stringify(localStorage)")
        context.close()


def test_the_keyboard_alone_is_enough(page):
    page.page.locator("#prompt").focus()
    page.page.keyboard.type("By hand")
    page.page.keyboard.press("Enter")
    page.answered()
    names = []
    name = "e => e.id || e.getAttribute('aria-label') || e.innerText || e.tagName"
    page.page.locator("body").evaluate("() => document.activeElement.blur()")
    for _ in range(60):
        page.page.keyboard.press("Tab")
        names.append(page.page.evaluate(f"() => ({name})(document.activeElement)"))
    chat, answer = ["toggle-chats", "new-chat", "find", "Rename this chat"], ["Edit", "Copy", "Retry"]
    for wanted in (*chat, *answer, "attach", "prompt", "temperature", "tools"):
        assert wanted in names, f"{wanted} cannot be reached: {names}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "width", "height"),
    [("desktop", 1280, 800), ("tablet", 900, 700), ("phone", 375, 667), ("zoom400", 320, 200)],
)
def test_it_fits_every_screen(browser, scheme, name, width, height):
    llama = FakeLlama(
        ["A table:\n\n| a | b |\n| --- | --- |\n| ", "wide " * 20, "| 2 |\n\n```\n", "code " * 40, "\n```\n"]
    )
    with serving_in_thread(llama) as url:
        page = Page(browser, llama, url, color_scheme=scheme)
        page.page.set_viewport_size({"width": width, "height": height})
        page.page.reload()
        page.connected()
        page.picture(f"{name}-{scheme}-empty")
        page.ask("A question that is rather long, so that it needs more than one line on a small screen.")
        page.picture(f"{name}-{scheme}")
        assert page.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        page.page.locator("#prompt").scroll_into_view_if_needed()
        box = page.page.locator("#prompt").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height
        page.check()
        if width < 1180:
            page.page.get_by_role("button", name="Chats", exact=True).click()
            page.picture(f"{name}-{scheme}-chats")
            page.check()
            page.page.keyboard.press("Escape")
            assert page.page.locator("#chats").is_hidden()
        page.context.close()


def test_the_page_opens_with_its_chats_when_the_server_is_away(page):
    page.ask("Before")
    page.page.evaluate("() => navigator.serviceWorker.ready")
    page.page.reload()
    while not page.page.evaluate("() => navigator.serviceWorker.controller !== null"):
        page.page.wait_for_timeout(100)
    page.context.set_offline(True)
    page.page.reload()
    page.page.get_by_text("The server cannot be reached.").first.wait_for()
    page.page.locator(".chat .open").click()
    assert page.turns() == ["Before", "Hello, world!"]
    page.picture("offline")
    page.context.set_offline(False)
    page.page.locator("#away").wait_for(state="hidden", timeout=10_000)
    page.ask("After")
    assert len(page.turns()) == 4
