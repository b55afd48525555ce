"""`jaxllama plan`: its answers, files and errors. No compiler here: libtpu is hidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from jaxllama.__main__ import main

CONFIG = json.loads((Path(__file__).parents[3] / "bench" / "configs" / "llama3-8b.json").read_text())


@pytest.fixture(autouse=True)
def _without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def command(*args: Any) -> int:
    return main(["plan", *map(str, args)])


def assert_refused(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.strip().splitlines()
    assert line.startswith("jaxllama plan: ")
    for part in parts:
        assert part in line


def test_a_config_is_planned_as_text(config, capsys):
    assert command(config, "--topology", "v5e:2x4", "--rows", 32) == 0
    text = capsys.readouterr().out
    for part in ("8.03B", "fits: yes", "v5e:2x4: 8 chips", "tokens/s", "pip install 'jaxllama[tpu]'"):
        assert part in text


def test_json_is_all_of_standard_output(config, capsys):
    flags = ("--weights", "int8", "--kv", "int8", "--json", "--dollars-per-chip-hour", "v5e=1.2,v6e=2.7")
    assert command(config, "--topology", "v5e:1x1", *flags) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] is True
    assert value["method"] == "analytic"
    assert value["dollars_per_million_tokens"] > 0
    assert value["num_params"] == 8_030_261_248


def test_what_does_not_fit_is_an_answer_too(config, capsys):
    assert command(config, "--topology", "v5e:1x1", "--rows", 512, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] is False
    assert value["bytes_per_device"]["free"] < 0
    assert 0 <= value["max_rows"] < 512


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_folders_are_planned(kind, config, tmp_path, tokenizer_folder, capsys):
    folder = config.parent
    if kind == "checkpoint":
        folder = tiny.write_checkpoint(tmp_path / "checkpoint", "divisible", tiny.scripted_weights("divisible", {}))
    assert command(folder, "--topology", "v6e:1x1", "--context", 256, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] is True
    assert (value["num_params"] == 8_030_261_248) is (kind == "folder")


def test_a_search_recommends_and_lists(config, capsys):
    assert command(config, "--search", "--rows", 16, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] is True
    assert value["recommended"] == value["candidates"][0]
    assert len({c["topology"] for c in value["candidates"]}) > 1
    assert command(config, "--search", "--topology", "v6e:2x2") == 0
    text = capsys.readouterr().out
    assert "recommended: v6e:2x2, data 1 x tp 4" in text


def test_a_plot_is_written(config, tmp_path):
    out = tmp_path / "plan.png"
    assert command(config, "--topology", "v6e:2x2", "--plot", out) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_how_to_install_it(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(config, "--topology", "v6e:2x2", "--plot", tmp_path / "plan.png") == 2
    assert_refused(capsys, "pip install 'jaxllama[plot]'")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--topology", "v6e:3x3"), ("'v6e:3x3'", "v6e: 1x1, 2x2, 2x4")),
        ((), ("--topology is missing", "--search")),
        (("--search", "--data", 2), ("--data and --search",)),
        (("--topology", "v6e:2x4", "--rows", 0), ("rows must be at least 1",)),
        (("--topology", "v6e:2x4", "--context", 200000), ("131072",)),
        (("--topology", "v6e:2x4", "--data", 3), ("data=3",)),
        (("--topology", "v6e:2x4", "--prompt", 5000), ("5000", "2048")),
        (("--topology", "v6e:2x4", "--chunk", 200), ("chunk_tokens (200)",)),
        (("--topology", "v6e:2x4", "--dollars-per-chip-hour", "cheap"), ("'cheap'",)),
        (("--topology", "v6e:2x4", "--dollars-per-chip-hour", "v9=2"), ("'v9=2'", "v5e")),
        (("--topology", "v6e:2x4", "--dollars-per-chip-hour", "nan"), ("'nan'",)),
        (("--topology", "v5e:1x1", "--search", "--rows", 4096), ("nothing fits of v5e:1x1",)),
    ],
)
def test_bad_values_are_exit_code_2_and_one_line(config, capsys, args, parts):
    assert command(config, *args) == 2
    assert_refused(capsys, *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(CONFIG | {"architectures": ["MixtralForCausalLM"]}), "MixtralForCausalLM"),
        (json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}), "hidden_size"),
    ],
)
def test_a_bad_config_is_exit_code_2_and_one_line(tmp_path, capsys, text, part):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    assert command(path, "--topology", "v6e:2x4") == 2
    assert_refused(capsys, part)


def test_help_groups_the_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        command("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("usage: jaxllama plan", "MODEL", "what is planned", "the answer", "--search", "--plot"):
        assert part in text


def test_nothing_else_reaches_standard_error(config):
    """In a process of its own, where JAX and libtpu could write there."""
    code = "import sys; sys.modules['libtpu'] = None; from jaxllama.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(config), "--topology", "v6e:2x4", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["fits"] is True
    assert done.stderr == ""
