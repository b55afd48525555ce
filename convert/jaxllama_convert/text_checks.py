"""Test-loads what a checkpoint's text side consists of, before the hours of copying weights."""

from __future__ import annotations

from pathlib import Path

from jaxllama.errors import ConversionError, JaxLlamaError
from jaxllama.text.chat import load_chat_template
from jaxllama.text.encoding.tokenizer import load_tokenizer


def check_tokenizer(folder: Path, vocab_size: int, source: str) -> None:
    """Loads the folder's tokenizer, if it has one. `source` is its name in messages.

    Raises: ConversionError when it cannot be loaded or does not fit the model.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return
    try:
        tokenizer = load_tokenizer(folder, vocab_size)
        tokenizer.decode(tokenizer.encode("The quick brown fox, 1234."))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # A hostile pattern makes tokenizers raise PanicException, which is no Exception.
    except BaseException as error:
        raise ConversionError(f"{source}: the tokenizer cannot be used: {_reason(error, folder)}") from None


def check_chat_template(folder: Path) -> list[str]:
    """A warning if the folder has no usable chat template; the model still completes text without one."""
    try:
        load_chat_template(folder)
    except JaxLlamaError as error:
        return [f"no chat template: {_reason(error, folder)}"]
    return []


def _reason(error: BaseException, folder: Path) -> str:
    # The folder of the unfinished checkpoint means nothing to the user.
    return " ".join(str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").split())[:500]
