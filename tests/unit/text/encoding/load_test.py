"""Hostile and damaged tokenizer files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxllama.errors import TokenizerError
from jaxllama.text.encoding.tokenizer import load_tokenizer

type Spec = dict[str, Any]


@pytest.fixture
def spec(r1_like: Path) -> Spec:
    return json.loads((r1_like / "tokenizer.json").read_text(encoding="utf-8"))


def refused(folder: Path, spec: Spec | None, match: str, write: Callable[..., Path], config: Any = None) -> None:
    with pytest.raises(TokenizerError, match=match):
        load_tokenizer(write(folder, spec, config or {}, None), 10_000)


def test_a_folder_without_tokenizer(tmp_path: Path, folder_writer: Any) -> None:
    refused(tmp_path, None, "neither", folder_writer)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 200_000, "ÿþ{"])
def test_damaged_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, 100)


@pytest.mark.parametrize("regex", ["(", "(a+)+$", r"\p{Nope}"])
def test_hostile_regexes(tmp_path: Path, spec: Spec, folder_writer: Any, regex: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    refused(tmp_path, {**spec, "pre_tokenizer": split}, "tokenizer", folder_writer)


def test_two_tokens_with_one_id(tmp_path: Path, spec: Spec, folder_writer: Any) -> None:
    vocab = spec["model"]["vocab"]
    vocab["b"] = vocab["a"]
    refused(tmp_path, spec, f"id {vocab['a']} belongs to both", folder_writer)


def test_a_duplicate_vocabulary_key(tmp_path: Path, r1_like: Path) -> None:
    text = (r1_like / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {"a": 7, ', 1), encoding="utf-8")
    with pytest.raises(TokenizerError, match="duplicate key 'a'"):
        load_tokenizer(tmp_path, 10_000)


def test_ids_that_the_library_renumbers(tmp_path: Path, spec: Spec, folder_writer: Any) -> None:
    spec["added_tokens"][-1]["id"] += 5
    refused(tmp_path, spec, "'</think>' has id .* the library reads", folder_writer)


def test_added_tokens_over_other_ids(tmp_path: Path, spec: Spec, folder_writer: Any) -> None:
    spec["added_tokens"][0]["id"] = 3
    refused(tmp_path, spec, "id 3 belongs to both", folder_writer)


def test_an_added_token_listed_twice(tmp_path: Path, spec: Spec, folder_writer: Any) -> None:
    spec["added_tokens"].append(copy.deepcopy(spec["added_tokens"][0]))
    refused(tmp_path, spec, "twice", folder_writer)


def test_ids_beyond_the_model(small_folder: Path) -> None:
    size = load_tokenizer(small_folder, 10_000).vocab_size
    load_tokenizer(small_folder, size)
    with pytest.raises(TokenizerError, match=f"vocab_size={size - 1}"):
        load_tokenizer(small_folder, size - 1)


def test_a_named_token_that_does_not_exist(tmp_path: Path, spec: Spec, folder_writer: Any) -> None:
    refused(tmp_path, spec, "<nope>", folder_writer, {"bos_token": "<nope>"})


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path, spec: Spec, folder_writer: Any) -> None:
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(folder_writer(tmp_path, spec, {}, None), 10_000)
    assert len(tokenizer.encode("one two three four five")) > 4


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, None])
def test_damaged_sentencepiece(tmp_path: Path, sp_like: Path, content: bytes | None) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        (sp_like / "tokenizer.model").read_bytes()[:999] if content is None else content
    )
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path, 10_000)


def test_added_tokens_that_contradict_sentencepiece(tmp_path: Path, sp_like: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sp_like / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 5}')
    with pytest.raises(TokenizerError, match="id 5 is"):
        load_tokenizer(tmp_path, 10_000)


def test_tokenizer_json_wins(tmp_path: Path, sp_like: Path, spec: Spec, folder_writer: Any) -> None:
    folder_writer(tmp_path, spec, {}, None)
    (tmp_path / "tokenizer.model").write_bytes((sp_like / "tokenizer.model").read_bytes())
    assert "<｜User｜>" in load_tokenizer(tmp_path, 10_000).special_tokens


def test_white_space_among_the_added_tokens_stays_text(
    tmp_path: Path, spec: Spec, folder_writer: Any, token_entry: Any
) -> None:
    token_id = spec["added_tokens"][-1]["id"] + 1
    spec["added_tokens"].append(token_entry(token_id, "    "))
    tokenizer = load_tokenizer(folder_writer(tmp_path, spec, {}, None), 10_000)
    assert token_id in tokenizer.encode("a    b")
    assert "    " not in tokenizer.special_tokens
