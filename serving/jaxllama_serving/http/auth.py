"""Bearer keys: every route is closed unless its own resource is on the list of open ones."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from jaxllama_serving.config import ServerConfigError
from jaxllama_serving.protocol.errors import ApiError


class KeyRing:
    """The accepted keys, kept as digests: comparing those leaks neither a key's bytes nor its length."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> bytes | None:
        """Returns the digest of the key that `authorization` (the header's value) carries; None if none is needed.

        Raises: ApiError, status 401.
        """
        if not self._digests:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("No API key was given. Send it as 'Authorization: Bearer KEY'.")
        digest = _digest(key.strip())
        # A sum, not `any`: every key is compared, whichever matches.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise _refused("The API key is wrong.")
        return digest


def _digest(key: str) -> bytes:
    # Header bytes that are not UTF-8 arrive as surrogates; they must compare, not raise.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refused(message: str) -> ApiError:
    return ApiError(401, message, "authentication_error", None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


def read_keys(key_file: Path | None, environment: str | None) -> tuple[str, ...]:
    """Returns the keys of `key_file` (one a line, `#` begins a comment line) and of `environment` (comma separated).

    Raises: ServerConfigError if a source is given but unreadable or empty. Never quotes a key.
    """
    keys: list[str] = []
    if key_file is not None:
        try:
            lines = key_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerConfigError(f"--api-key-file {key_file}: cannot be read ({type(error).__name__})") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ServerConfigError(f"--api-key-file {key_file}: holds no key. Write one a line.")
        keys += found
    if environment is not None:
        found = [key.strip() for key in environment.split(",") if key.strip()]
        if not found:
            raise ServerConfigError(
                "JAXLLAMA_API_KEYS is set but holds no key. Unset it, or give keys, comma separated."
            )
        keys += found
    return tuple(keys)
