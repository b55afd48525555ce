"""Chunks that are being scored: launched with the prefill, read once the devices have done them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllama.decode.scoring import Scores, Targets
from jaxllama.decode.state import Chunk, Place
from jaxllama.engine.calls import Programs, Score
from jaxllama.engine.scheduling.chunks import Span
from jaxllama.engine.scheduling.request import EngineRequest, PromptLogprob, TokenOutput
from jaxllama.errors import NonFiniteLogitsError


@dataclass(frozen=True)
class ScoredSpan:
    """A launched `prefill_scores` of `span` of a request's prompt. Reading the output waits for the device."""

    request: EngineRequest
    span: Span
    output: Scores

    @classmethod
    def launch(
        cls, programs: Programs, request: EngineRequest, span: Span, place: Place, chunk: Chunk
    ) -> ScoredSpan | None:
        """Scores what `request` asks for of `span`, while its keys and values are written. None: nothing is asked."""
        assert request.scoring is not None
        following = np.zeros(span.size, np.int32)
        following[: span.num_tokens] = request.prompt[span.start + 1 : span.start + span.num_tokens + 1]
        first = max(0, request.scoring.first - 1 - span.start)
        targets = Targets(following, np.int32(first), np.int32(request.scoring.num_top))
        output = programs.run(Score(place, chunk, targets))
        if first >= span.num_tokens:
            return None
        for array in output:
            array.copy_to_host_async()
        return cls(request, span, output)

    def take(self) -> TokenOutput:
        """What there is to tell that was not told: a request that was set aside is scored again from its start."""
        scoring, start = self.request.scoring, self.span.start
        assert scoring is not None
        places = range(scoring.next - 1 - start, self.span.num_tokens)
        logprobs, ranks, ids, values = (np.asarray(part) for part in self.output)
        if not np.isfinite(logprobs[places.start : places.stop]).all():
            error = NonFiniteLogitsError("the model produced NaN or infinity for this prompt")
            return TokenOutput(finish_reason="error", error=error)
        told = []
        for i in places:
            token, num_top = self.request.prompt[start + i + 1], scoring.num_top
            top = zip(ids[i, :num_top].tolist(), values[i, :num_top].tolist(), strict=True)
            told.append(
                PromptLogprob(token, float(logprobs[i]), int(ranks[i]), tuple(top), is_greedy=token == int(ids[i, 0]))
            )
        scoring.next += len(told)
        return TokenOutput(scores=tuple(told), finish_reason="length" if self.request.has_all_scores else None)
