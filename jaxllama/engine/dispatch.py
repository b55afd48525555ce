"""A launched `decode_steps`, and its output on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxllama.decode.state import StepOutput
from jaxllama.engine.options import StepReport
from jaxllama.engine.request import EngineRequest, TokenLogprob


@dataclass(frozen=True)
class Dispatch:
    """A dispatch whose output is not read yet. `rows` is who held which row when it was launched, at `launched`.

    Reading the output waits for the device.
    """

    output: StepOutput
    rows: dict[int, EngineRequest]
    max_steps: int
    launched: float

    def token_logprob(self, token: int, count: int, step: int, row: int) -> TokenLogprob:
        """What `logprobs=count` asks for at one step of one row."""
        chosen, ids, values = self._logprobs
        top = zip(ids[step, row, :count].tolist(), values[step, row, :count].tolist(), strict=True)
        return TokenLogprob(token, float(chosen[step, row]), tuple(top))

    def report(self, num_steps: int, step_s: float) -> StepReport:
        """What it did; the rows' lengths are those before its tokens are added to them."""
        lengths = [len(request.prompt) + len(request.generated) for request in self.rows.values()]
        kv_tokens = sum(lengths) + len(lengths) * num_steps / 2
        return StepReport(num_steps, len(lengths), num_steps * step_s, kv_tokens)

    @cached_property
    def _logprobs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.asarray(self.output.logprobs), np.asarray(self.output.top_ids), np.asarray(self.output.top_logprobs)
