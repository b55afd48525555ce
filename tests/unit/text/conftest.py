"""Small tokenizers that cover the paths of the real ones: R1's, a ChatML model's, Llama-2's in both formats."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SHARED = Path(__file__).parents[3].parent / "shared" / "assets"

CORPUS = (
    "Hello world! The quick brown fox jumps over the lazy dog.",
    "  leading and trailing   ",
    "a\n\nb\r\n\tc\n\n\n   d",
    "0 1 12 123 1234 12345 3.14159 1e-9 ٣٤٥",
    "def f(x):\n    return {'a': x ** 2}[\"a\"]  # comment\n",
    "I'll, you'VE, don't; it's naïve café Ångström",
    "你好，世界。今天天气很好！日本語のテキスト 한국어 문장",
    "שלום עולם مرحبا بالعالم",
    "👩‍👩‍👧 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪",
    "e\u0301 combining a\u0308\u0323 \u200b zero width \ufeff",
    "नमस्ते ไทย ภาษา",
    "x" * 300,
    " " * 40,
    "\n" * 20,
    "",
    " ",
    "mixed你好mixed123тест",
    "\u0000 nul and \u007f control \u0085",
    "▁ lower one eighth block ▁▁",
    "a < b > c <= d <| e |> </ f",
)

R1_LIKE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)


def added_token(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": content, **{name: flags.get(name, False) for name in names}}


def write_folder(folder: Path, spec: dict[str, Any] | None, config: dict[str, Any], template: str | None) -> Path:
    """A folder with the tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    if spec is not None:
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def byte_level_spec(split: Any, initial: list[str]) -> dict[str, Any]:
    """A byte-level BPE trained on the corpus."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=initial, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="session")
def r1_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with added tokens above the vocabulary, four of them not special; BOS is added."""
    spec = byte_level_spec(pre_tokenizers.Digits(individual_digits=False), [])
    size = len(spec["model"]["vocab"])
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|eot_id|>"]
    visible = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    spec["added_tokens"] = [added_token(size + i, content, special=True) for i, content in enumerate(special)]
    spec["added_tokens"] += [added_token(size + 3 + i, content) for i, content in enumerate(visible)]
    bos = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], size)])
    spec["post_processor"] = json.loads(_with_post_processor(bos).to_str())["post_processor"]
    config = {"bos_token": {"content": special[0]}, "eos_token": special[1]}
    return write_folder(tmp_path_factory.mktemp("r1"), spec, config, R1_LIKE_TEMPLATE)


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with its special tokens inside the vocabulary; no BOS is added."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    spec = byte_level_spec(pre_tokenizers.Digits(individual_digits=True), special)
    config = {"bos_token": special[1], "eos_token": special[2]}
    return write_folder(tmp_path_factory.mktemp("chatml"), spec, config, CHATML_TEMPLATE)


@pytest.fixture(scope="session")
def mistral_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE whose marks of tools are special, as Tekken's are in tokenizer.json."""
    special = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
    spec = byte_level_spec(pre_tokenizers.Digits(individual_digits=True), special)
    return write_folder(tmp_path_factory.mktemp("mistral"), spec, {"bos_token": "<s>", "eos_token": "</s>"}, None)


@pytest.fixture(scope="session")
def llama2_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BPE over ▁ with byte fallback in tokenizer.json, as converted Llama-2 tokenizers have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Only ASCII is in the alphabet: everything else falls back to bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=pieces, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(_ascii_lines(), trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return write_folder(tmp_path_factory.mktemp("llama2"), spec, config, LLAMA2_TEMPLATE)


@pytest.fixture(scope="session")
def sp_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with byte fallback, control and user-defined pieces, and one added token."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_ascii_lines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<think>", "</think>"],
        user_defined_symbols=["<|im_end|>", "xx"],
        minloglevel=2,
    )
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = write_folder(tmp_path_factory.mktemp("sp"), None, config, LLAMA2_TEMPLATE)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 480}))
    return folder


def shared(*parts: str) -> Path:
    """A file of the shared assets, or a skip."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """DeepSeek-R1-Distill-Llama's own files."""
    return shared("r1-distill-llama-tokenizer")


@pytest.fixture(scope="session")
def llama2() -> Path:
    """Llama-2's tokenizer.json."""
    return shared("llama2-sp")


@pytest.fixture(scope="session")
def llama2_sp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2's tokenizer.model alone."""
    folder = tmp_path_factory.mktemp("llama2_sp")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(shared("llama2-sp", name), folder / name)
    return folder


def _ascii_lines() -> list[str]:
    lines = ["".join(char for char in text if char.isascii() and char.isprintable()) for text in CORPUS]
    return [line for line in lines if line.strip()]


def _with_post_processor(processor: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.post_processor = processor
    return tokenizer


@pytest.fixture(scope="session", params=["r1_like", "chatml", "llama2_like", "r1", "llama2"])
def json_folder(request: pytest.FixtureRequest) -> Path:
    """Every tokenizer.json in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["r1_like", "chatml", "llama2_like", "sp_like"])
def small_folder(request: pytest.FixtureRequest) -> Path:
    """Every small tokenizer in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["r1_like", "chatml", "llama2_like", "sp_like", "r1", "llama2", "llama2_sp"])
def any_folder(request: pytest.FixtureRequest) -> Path:
    """Every tokenizer in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def corpus() -> tuple[str, ...]:
    """Varied texts."""
    return CORPUS


@pytest.fixture(scope="session")
def folder_writer() -> Any:
    """`write_folder`."""
    return write_folder


@pytest.fixture(scope="session")
def token_entry() -> Any:
    """`added_token`."""
    return added_token
