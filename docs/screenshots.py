"""The chat page's pictures for the README: a running server, a real conversation, Chromium, light and dark.

jaxllama serve MODEL --port 8000
python docs/screenshots.py http://localhost:8000
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent / "_static"
QUESTION = "Give me three short tips for a first visit to Paris, as a list."


def main(url: str) -> None:
    """Writes chat-light.webp and chat-dark.webp."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            size = {"width": 1180, "height": 720}
            page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1.5)
            page.goto(url)
            page.locator("#temperature").fill("0.7")
            page.locator("#seed").fill("7")
            page.locator("#max_tokens").fill("160")
            page.locator("#prompt").fill(QUESTION)
            page.keyboard.press("Enter")
            page.locator(".turn.assistant:not([aria-busy])").wait_for(timeout=120_000)
            page.mouse.move(0, 0)
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.save(HERE / f"chat-{scheme}.webp", quality=80, method=6)
            page.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
