"""The body of `/admin/profile`."""

from __future__ import annotations

from jaxllama.system.profile import MAX_SECONDS
from jaxllama_serving.protocol.base import Strict, number, with_example


class ProfileRequest(Strict):
    """How long to record."""

    model_config = with_example(seconds=0.1)

    seconds: float = number(3.0, 0.1, MAX_SECONDS)
