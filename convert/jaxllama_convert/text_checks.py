"""Test-loads what a checkpoint's text side consists of, before the hours of copying weights."""

from __future__ import annotations

from pathlib import Path

from jaxllama.errors import ConversionError, JaxLlamaError, TokenizerError, one_line
from jaxllama.text.chat import load_chat_template
from jaxllama.text.encoding.trial import try_tokenizer


def check_tokenizer(folder: Path, vocab_size: int, source: str) -> None:
    """Tries the folder's tokenizer out, if it has one. `source` is its name in messages.

    Raises: ConversionError when it cannot be used or does not fit the model.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return
    try:
        try_tokenizer(folder, vocab_size)
    except TokenizerError as error:
        raise ConversionError(f"{source}: the tokenizer cannot be used: {_reason(error, folder)}") from None


def check_chat_template(folder: Path) -> list[str]:
    """A warning if the folder has no usable chat template; the model still completes text without one."""
    try:
        load_chat_template(folder)
    except JaxLlamaError as error:
        return [f"no chat template: {_reason(error, folder)}"]
    return []


def _reason(error: Exception, folder: Path) -> str:
    # The folder of the unfinished checkpoint means nothing to the user.
    return one_line(str(error).replace(f"{folder}/", "").replace(f"{folder}: ", ""), 500)
