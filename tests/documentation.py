"""The documentation's code blocks, and what each needs to run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = ("generated", "_build")
PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (*sorted(DOCS.glob("**/*.md")), ROOT / "README.md")
    if not set(MADE) & set(path.relative_to(ROOT).parts)
)

NEEDS = {
    "tpu": "a TPU VM",
    "gpu": "an NVIDIA GPU",
    "profiles": "a server with keys and --profile-dir",
    "libtpu": "the TPU compiler, and minutes for each plan",
    "network": "the network beyond a package index",
    "models": "models that are not here",
    "cluster": "a Kubernetes cluster",
    "docker": "a Docker daemon",
    "hosts": "several hosts",
    "time": "minutes",
}
"""What a page may say above a block, as `<!-- needs: tpu -->`, and what it means. Other blocks are run by a test."""

_BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `needs` is empty where it can be run here."""

    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """Those of a page, in their order."""
    return [
        Block(
            page,
            text.count("\n", 0, match.start("text")),
            match["language"],
            match["text"],
            tuple(re.split(r",\s*", match["needs"])) if match["needs"] else (),
        )
        for match in _BLOCK.finditer(text)
    ]


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))]
