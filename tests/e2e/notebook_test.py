"""The notebooks run from top to bottom on the default model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "models" / "SmolLM2-135M-Instruct"


NOTEBOOKS = {
    "decode": (2, "Paris"),
    "decoding_directly": (1, "True"),
    "determinism": (2, "240 of 240 log-probabilities"),
    "looking_in": (4, "the answer:  Paris"),
    "sampling_controls": (3, "in the year 19"),
    "speculation_and_speed": (3, "code, one change"),
    "steering": (2, "rows that changed: [3]"),
    "training": (1, "version 1: "),
}
"""How many pictures each shows, and what it prints somewhere."""


@pytest.mark.slow
@pytest.mark.skipif(not (CHECKPOINT / "manifest.json").exists(), reason="the default model is not converted: make test")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # The kernel is a process of its own: one device, as a reader has, not the eight fake ones of the tests.
    # Most of its time is compilation, which this halves.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAXLLAMA_CHECKPOINT", str(CHECKPOINT))
    num_pictures, printed = NOTEBOOKS[name]
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    asyncio.run(client.async_execute())
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_pictures
    assert any(printed in output.get("text", "") for output in outputs)
