"""guidellm's load of 40 requests, with the default model's tokenizer."""

from __future__ import annotations

import json
import subprocess

import pytest

NUM_REQUESTS = 40


@pytest.mark.timeout(600)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def check_forty_requests(url, checkpoint, tmp_path, route):
    report = tmp_path / "report.json"
    command = [
        *("guidellm", "run", "--backend", f"kind=openai_http,target={url},model=default,request_format={route}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=12"),
        *("--tokenizer", f"kind=huggingface_auto,model={checkpoint}"),
        *("--output", f"kind=json,path={report}", "--disable-console-interactive"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)
