"""What the default model's goldens are made of. Whoever changes it runs `make oracle` again."""

from __future__ import annotations

import json
import random
from pathlib import Path

_CARGOES = ["salt", "copper wire", "green tea", "clocks", "barley", "paper", "olive oil"]
_LONG = " ".join(
    f"Ship {n} left harbour {n % 7} on day {n * 3 % 31} with {n * 17 % 101} crates of {_CARGOES[(n - 1) % 7]} "
    f"and a crew of {n % 9 + 4}."
    for n in range(1, 29)
)

LOGIT_PROMPTS = {
    "capital": "The capital of France is Paris, and the capital of Japan is",
    "code": (
        'def fibonacci(n: int) -> int:\n    """Returns the n-th number."""\n    if n < 2:\n        return n\n    return'
    ),
    "multilingual": "El río cruza la ciudad. 今日はとても良い天気です。 Привет, мир! 🌍🚀 Ünïcödé",
    "numbers": "1 + 1 = 2\n2 + 2 = 4\n4 + 4 = 8\n8 + 8 = 16\n16 + 16 =",
    "one_token": "Hello",
    # Longer than a page and than a prefill chunk of 512 tokens.
    "long": _LONG,
    "chat": (
        "<|im_start|>system\nYou are a terse assistant.<|im_end|>\n"
        "<|im_start|>user\nName three primary colours.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}
# How many positions of each, 64 in all; spread evenly from the first to the last.
LOGIT_POSITIONS = {"capital": 8, "code": 10, "multilingual": 10, "numbers": 8, "one_token": 1, "long": 17, "chat": 10}

GREEDY_TEXTS = {
    "story": "Once upon a time, in a small village by the sea,",
    "science": "Photosynthesis is the process by which",
    "code": "def is_prime(n):\n",
    "list": "The planets of the solar system are: 1. Mercury, 2. Venus, 3.",
}
GREEDY_CHATS = {
    "gravity": [{"role": "user", "content": "Explain gravity to a child in two sentences."}],
    "haiku": [
        {"role": "system", "content": "You are a poet who answers in short lines."},
        {"role": "user", "content": "Write about autumn rain."},
    ],
    "arithmetic": [{"role": "user", "content": "What is 12 times 12? Show your work."}],
    "turns": [
        {"role": "user", "content": "My name is Ada and I like chess."},
        {"role": "assistant", "content": "Nice to meet you, Ada! Chess is a great game."},
        {"role": "user", "content": "Which opening should I learn first?"},
    ],
}
NUM_GREEDY_TOKENS = 64


def tokenizer_corpus() -> list[str]:
    """The edge cases of corpus.json and 150 random joins of its awkward pieces, the same at every call."""
    corpus = json.loads((Path(__file__).parent / "corpus.json").read_text(encoding="utf-8"))
    rng = random.Random(7)
    joined = ["".join(rng.choices(corpus["pieces"], k=rng.randint(2, 24))) for _ in range(150)]
    return list(dict.fromkeys([*corpus["strings"], *joined, *LOGIT_PROMPTS.values(), *GREEDY_TEXTS.values()]))
