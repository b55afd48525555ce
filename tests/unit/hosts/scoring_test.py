"""Scores of a model that is spread over two processes, in a library's use of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from processes import Process, free_port

import jaxllama

NAME = "divisible"
PROGRAM = """
import json, sys
import jaxllama
from jaxllama.hosts.group import join

address, process_id, model, asked = sys.argv[1:]
asked = json.loads(asked)
group = join(address, num_processes=2, process_id=int(process_id), join_timeout_s=60)
options = jaxllama.EngineOptions(**asked["options"])
with jaxllama.load(model, data=asked["data"], options=options, group=group) as llama:
    if group.is_leader:
        scores = llama.score(*asked["pairs"], per_token=True)
        whole = list(llama.prompt_logprobs(asked["prompt"], 2))
        values = [[token.logprob for token in score.tokens] for score in scores]
        print(json.dumps({"scores": values, "greedy": [score.is_greedy for score in scores],
                          "prompt": [entry.logprob for entry in whole], "ranks": [entry.rank for entry in whole]}))
        print("scored", flush=True)
    else:
        llama.engine.follow()
"""


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2])
def test_two_processes_score_as_one(tmp_path: Path, data: int):
    """Contexts that are shared and own, endings over several chunks; with `data` 2 each process serves its own rows."""
    model = tiny.write_checkpoint(tmp_path / "model", NAME, num_hidden_layers=1)
    contexts = [tiny.prompt_of(NAME, length, seed) for seed, length in enumerate([1, 12, 12, 41])]
    endings = [tiny.prompt_of(NAME, length, 50 + length) for length in (1, 3, 17, 9)]
    options = {"max_rows": 4, "max_context": 96, "page_size": 4, "num_pages": 121, "chunk_sizes": (8, 32)}
    asked: dict[str, Any] = {"options": options, "data": data, "prompt": contexts[3]}
    asked["pairs"] = [contexts + contexts[:1], endings + endings[2:3]]
    address = f"127.0.0.1:{free_port()}"
    arguments = (str(model), json.dumps(asked))
    processes = [Process(tmp_path, f"{i}", "-c", PROGRAM, address, str(i), *arguments) for i in range(2)]
    try:
        processes[0].wait_for("scored")
        assert [process.code() for process in processes] == [0, 0], processes[1].text
    finally:
        for process in processes:
            process.end()
    found = json.loads(next(line for line in processes[0].text.splitlines() if line.startswith('{"scores"')))
    with jaxllama.load(model, jaxllama.make_mesh(tiny.config_of(NAME), tp=1), options=tiny.SMALL) as llama:
        scores = llama.score(*asked["pairs"], per_token=True)
        whole = list(llama.prompt_logprobs(asked["prompt"], 2))
    for values, score in zip(found["scores"], scores, strict=True):
        assert score.tokens is not None
        np.testing.assert_allclose(values, [token.logprob for token in score.tokens], atol=1e-4)
    assert found["greedy"] == [score.is_greedy for score in scores]
    np.testing.assert_allclose(found["prompt"], [entry.logprob for entry in whole], atol=1e-4)
    assert found["ranks"] == [entry.rank for entry in whole]
