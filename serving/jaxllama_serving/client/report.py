"""What a load showed: throughput, latencies and goodput, as a table, as JSON and as a picture.

The JSON has the field names of `vllm bench serve --save-result`, so that what reads those reads these.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllama.errors import MissingExtraError
from jaxllama_serving.client.load import Load, Outcome

PERCENTILES = (50, 90, 99)
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between chunks",
    "e2el": "time to the end",
}


@dataclass(frozen=True)
class Report:
    """The outcomes of a load that took `duration_s` seconds. `bounds` are goodput's, milliseconds by metric."""

    outcomes: Sequence[Outcome]
    duration_s: float
    load: Load
    model: str
    url: str
    bounds: Mapping[str, float]

    @property
    def completed(self) -> list[Outcome]:
        """Those that did not fail."""
        return [outcome for outcome in self.outcomes if outcome.error is None]

    @property
    def errors(self) -> Counter[str]:
        """How often each error came."""
        return Counter(outcome.error for outcome in self.outcomes if outcome.error is not None)

    def samples_ms(self, metric: str) -> list[float]:
        """All values of a metric, in milliseconds."""
        return [value for outcome in self.completed for value in _samples_ms(outcome, metric)]

    @property
    def num_good(self) -> int:
        """Requests that kept every bound, each by its own mean."""

        def keeps(outcome: Outcome) -> bool:
            return all(
                not (samples := _samples_ms(outcome, metric)) or statistics.fmean(samples) <= bound
                for metric, bound in self.bounds.items()
            )

        return sum(map(keeps, self.completed))

    def as_dict(self) -> dict[str, Any]:
        """Totals and rates, then every metric's statistics, then what each request did."""
        done, seconds = self.completed, max(self.duration_s, 1e-9)
        num_in = sum(outcome.num_prompt_tokens for outcome in done)
        num_out = sum(outcome.num_output_tokens for outcome in done)
        result: dict[str, Any] = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai-chat",
            "backend": "openai-chat",
            "label": None,
            "model_id": self.model,
            "tokenizer_id": None,
            "base_url": self.url,
            "num_prompts": len(self.outcomes),
            "request_rate": "inf" if self.load.rate is None else self.load.rate,
            "burstiness": 1.0,
            "max_concurrency": self.load.max_clients,
            "duration": self.duration_s,
            "completed": len(done),
            "failed": len(self.outcomes) - len(done),
            "total_input_tokens": num_in,
            "total_output_tokens": num_out,
            "request_throughput": len(done) / seconds,
            "request_goodput": self.num_good / seconds if self.bounds else None,
            "output_throughput": num_out / seconds,
            "total_token_throughput": (num_in + num_out) / seconds,
            "max_concurrent_requests": _most_at_once(self.outcomes),
        }
        for metric in METRICS:
            result |= _statistics(metric, self.samples_ms(metric))
        return result | {
            "input_lens": [outcome.num_prompt_tokens for outcome in self.outcomes],
            "output_lens": [outcome.num_output_tokens for outcome in self.outcomes],
            "ttfts": [outcome.ttft_s for outcome in self.outcomes],
            "itls": [outcome.itls_s for outcome in self.outcomes],
            "generated_texts": [outcome.text for outcome in self.outcomes],
            "errors": [outcome.error or "" for outcome in self.outcomes],
        }

    def as_text(self) -> str:
        """What a person wants to see, in lines."""
        values = self.as_dict()
        lines = [
            f"{values['completed']} requests done, {values['failed']} failed, in {self.duration_s:.1f} s",
            f"{values['request_throughput']:.2f} requests/s, {values['output_throughput']:,.0f} output tokens/s, "
            f"{values['total_token_throughput']:,.0f} tokens/s in all",
            f"{values['total_input_tokens']:,} tokens in, {values['total_output_tokens']:,} out; "
            f"{values['max_concurrent_requests']} requests at once at most",
        ]
        if self.bounds:
            bounds = ", ".join(f"{metric} {bound:g} ms" for metric, bound in self.bounds.items())
            lines.append(f"{values['request_goodput']:.2f} requests/s within {bounds}: {self.num_good}")
        lines += (
            []
            if not self.completed
            else ["", f"{'ms':<24}{'mean':>10}" + "".join(f"{f'p{p}':>10}" for p in PERCENTILES)]
        )
        for metric, name in METRICS.items() if self.completed else ():
            row = [values[f"mean_{metric}_ms"], *(values[f"p{p}_{metric}_ms"] for p in PERCENTILES)]
            lines.append(f"{name:<24}" + "".join(f"{value:>10,.1f}" for value in row))
        lines += [f"failed {count} times: {error}" for error, count in self.errors.most_common(5)]
        return "\n".join(lines)

    def save_json(self, path: Path) -> None:
        """Writes `as_dict`. Raises: OSError."""
        path.write_text(json.dumps(self.as_dict()) + "\n", encoding="utf-8")

    def save_plot(self, path: Path) -> None:
        """Draws how many requests were within which time, and output tokens a second over time.

        Raises: MissingExtraError without matplotlib; OSError.
        """
        check_plotting()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4), layout="constrained")
        latencies, ends, over_time = figure.subplots(1, 3)
        for axes, metrics, title in ((latencies, ("ttft", "e2el"), "requests"), (ends, ("tpot", "itl"), "tokens")):
            for metric in metrics:
                values = np.sort(self.samples_ms(metric))
                if len(values):
                    axes.plot(values, 100 * np.arange(1, len(values) + 1) / len(values), label=METRICS[metric])
            axes.set(xlabel="ms", ylabel=f"% of {title} within it", ylim=(0, 101))
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(loc="lower right")
        seconds, rate = _rate_over_time(self.completed)
        over_time.step(seconds, rate, where="post")
        over_time.set(xlabel="s", ylabel="output tokens/s")
        over_time.set_ylim(bottom=0)
        over_time.grid(alpha=0.3)
        totals = self.as_dict()
        figure.suptitle(
            f"{self.model}: {totals['completed']} requests, {totals['output_throughput']:,.0f} output tokens/s"
        )
        figure.savefig(path, dpi=120)


def check_plotting() -> None:
    """Raises: MissingExtraError without matplotlib, before the minutes that a load takes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("plot", "matplotlib") from None


def _samples_ms(outcome: Outcome, metric: str) -> list[float]:
    values = {
        "ttft": [outcome.ttft_s] if outcome.token_times else [],
        "tpot": [] if outcome.tpot_s is None else [outcome.tpot_s],
        "itl": outcome.itls_s,
        "e2el": [outcome.latency_s],
    }
    return [1e3 * value for value in values[metric]]


def _statistics(metric: str, samples: list[float]) -> dict[str, float]:
    values = np.asarray(samples or [0.0])
    found = {
        f"mean_{metric}_ms": float(values.mean()),
        f"median_{metric}_ms": float(np.median(values)),
        f"std_{metric}_ms": float(values.std()),
    }
    return found | {f"p{p}_{metric}_ms": float(np.percentile(values, p)) for p in PERCENTILES}


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = sorted(change for o in outcomes for change in ((o.started, 1), (o.ended, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _rate_over_time(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds since the first request, and output tokens in each; a request's tokens are spread over its chunks."""
    if not outcomes:
        return np.zeros(1), np.zeros(1)
    first = min(outcome.started for outcome in outcomes)
    times = np.concatenate([np.asarray(o.token_times) - first for o in outcomes])
    weights = [np.full(len(o.token_times), o.num_output_tokens / max(1, len(o.token_times))) for o in outcomes]
    edges = np.arange(0, max(times.max(initial=0.0), 1.0) + 1)
    counts, _ = np.histogram(times, bins=edges, weights=np.concatenate(weights))
    return edges, np.append(counts, counts[-1:])
