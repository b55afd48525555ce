"""`jaxllama check` over several processes: what they compute is compared, and what does not hold anywhere is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from processes import END_TIMEOUT_S, Process, free_port

from jaxllama.errors import ConfigError
from jaxllama.llama.check import cli, hosts

# Each process's own parts are tested by themselves: here they are one line, which fails in process 1.
SCRIPT = """
import sys

import jax
from jaxllama.__main__ import main
from jaxllama.llama.check import cli, hosts, model, speed
from jaxllama.llama.check.result import Result

process_id, wrong = sys.argv[1], sys.argv[2] == "wrong"
speed._CALL_S, speed._REPEATS = 0.0, 1
status = "fails" if wrong and process_id == "1" else "holds"
cli.check = lambda name, config, say: [Result("attention", "decode", status, "off by nan")]
if wrong and process_id == "1":
    logits_of = hosts.logits_of
    hosts.logits_of = lambda *args: logits_of(*args) + 2.0**-40
if wrong:
    psum = jax.lax.psum
    jax.lax.psum = lambda x, axes: psum(x * (1 + 2.0**-12), axes)
flags = ["--coordinator", sys.argv[3], "--num-processes", "2", "--process-id", process_id]
sys.exit(main(["check", "--json", "--quiet", *flags]))
"""


@pytest.mark.parametrize("wrong", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_compare_what_they_compute(tmp_path: Path, wrong: bool):
    """Wrong are process 1's own devices, its logits by a bit, and all sums over devices."""
    script = tmp_path / "check.py"
    script.write_text(SCRIPT)
    address = f"127.0.0.1:{free_port()}"
    how = ("wrong" if wrong else "right", address)
    processes = [Process(tmp_path, f"{i}", script, str(i), *how) for i in range(2)]
    try:
        codes = [process.code(4 * END_TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.end()
    text = processes[0].text
    results = json.loads(text[text.index('{\n  "versions"') :])["results"]
    found: dict[str, Any] = {result["what"]: result for result in results if result["part"] == "hosts"}
    looked_at = (
        alone := found["process 1, its own devices"],
        bits := found["logits of two layers, one device of each process"],
        messages := found["an all-gather and an all-reduce over 4 devices of all processes"],
    )
    assert [result["status"] for result in looked_at] == ["fails" if wrong else "holds"] * 3
    assert codes == [wrong, wrong]
    assert alone["found"] == ("0 hold, 1 do not" if wrong else "1 hold, 0 do not")
    assert ("OTHER BITS in process 1" in bits["found"]) == wrong
    assert ("a wrong all-reduce in process 0" in messages["found"]) == wrong
    assert ["process 1: decode"] * wrong == [r["what"] for r in results if r["what"].startswith("process 1:")]
    assert found["all-reduce over 4"]["figures"]["latency_s"] > 0


def test_the_flags_come_together():
    parser = cli.argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(ConfigError, match="all three"):
        cli.run(parser.parse_args(["--coordinator", "host:1", "--process-id", "0"]))


def test_one_process_has_the_same_bits_twice():
    config = tiny.config_of("divisible")
    assert hosts._model_bits(config) == hosts._model_bits(config)
    assert len(hosts._message_bits(hosts._all_devices())) == 64
