"""The `jaxllama` command: its output, its exit codes 0, 1 and 2, and errors of one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import jaxllama
from jaxllama.__main__ import main
from jaxllama.errors import NonFiniteLogitsError
from jaxllama.text.encoding.tokenizer import load_tokenizer

TEXT = "bcdefghij"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Says the alphabet after "a"."""
    ids = load_tokenizer(tokenizer_folder, 280).encode("a" + TEXT)
    chain = dict(zip(ids, [*ids[1:], tiny.EOS_ID], strict=True))
    folder = tmp_path_factory.mktemp("cli") / "scripted"
    # A short context: the command line asks for no other.
    weights = tiny.scripted_weights("divisible", chain)
    return tiny.write_checkpoint(folder, "divisible", weights, max_position_embeddings=512)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes every device; one of the eight fake ones compiles fastest."""
    make_mesh = jaxllama.make_mesh
    monkeypatch.setattr("jaxllama.llama.llama.make_mesh", lambda config, **_: make_mesh(config, tp=1))


def command(*args: Any) -> int:
    return main([*map(str, args), "--compilation-cache", "off"])


def assert_one_line(text: str, *parts: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert text.startswith(("jaxllama ", "jaxllama: "))
    assert text.rstrip("\n").isprintable()
    assert "Traceback" not in text
    for part in parts:
        assert part in text


# ---- generate ----


def test_generate_prints_the_text(checkpoint, capsys):
    assert command("generate", checkpoint, "a", "--temperature", 0) == 0
    assert capsys.readouterr().out == TEXT + "\n"


def test_generate_in_int8_prints_the_text(checkpoint, capsys):
    assert command("generate", checkpoint, "a", "--temperature", 0, "--quantize", "int8", "--kv-dtype", "int8") == 0
    assert capsys.readouterr().out == TEXT + "\n"


def test_generate_prints_the_completion_as_json(checkpoint, capsys):
    assert command("generate", checkpoint, "a", "--temperature", 0, "--max-tokens", 3, "--json", "--logprobs", 2) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["text"] == TEXT[:3]
    assert got["finish_reason"] == "length"
    assert len(got["token_ids"]) == len(got["logprobs"]) == 3
    assert len(got["logprobs"][0]["top"]) == 2
    assert len(got["prompt_token_ids"]) == 1
    assert isinstance(got["seed"], int)


def test_the_same_seed_prints_the_same_text(checkpoint, capsys):
    outputs = []
    flags = ("--temperature", 2, "--max-tokens", 20, "--ignore-eos", "--json")
    for seed in (1, 1, 2):
        assert command("generate", checkpoint, "a", *flags, "--seed", seed) == 0
        outputs.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert outputs[0] == outputs[1] != outputs[2]


def test_stop_strings_may_be_repeated(checkpoint, capsys):
    assert command("generate", checkpoint, "a", "--temperature", 0, "--stop", "xyz", "--stop", "ef") == 0
    assert capsys.readouterr().out == "bcd\n"


def test_a_dash_reads_the_prompt_from_standard_input(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a"))
    assert command("generate", checkpoint, "-", "--temperature", 0) == 0
    assert capsys.readouterr().out == TEXT + "\n"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("a", "--temperature", "3"), "temperature"),
        (("a", "--top-p", "0"), "top_p"),
        (("a", "--logprobs", "21", "--json"), "logprobs"),
        (("a", "--logprobs", "2"), "--json"),
        (("a", "--seed", "-1"), "seed"),
        (("a", "--stop", ""), "stop"),
        (("",), "empty"),
        (("a" * 600,), "context"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(checkpoint, capsys, args, named):
    assert command("generate", checkpoint, *args) == 2
    output = capsys.readouterr()
    assert_one_line(output.err, named)
    assert output.out == ""


def test_a_draft_model_of_another_vocabulary_is_exit_code_2(checkpoint, tmp_path, capsys):
    other = tiny.write_checkpoint(tmp_path / "other", "divisible")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("<think>", "<thunk>"))
    assert main(["generate", str(checkpoint), "a", "--draft", str(other)]) == 2
    assert "the draft model 'other' has not the vocabulary of 'scripted': token 259 is" in capsys.readouterr().err


def test_a_missing_checkpoint_is_exit_code_2(tmp_path, capsys):
    assert command("generate", tmp_path / "nowhere", "a") == 2
    assert_one_line(capsys.readouterr().err, "nowhere", "does not exist", "looked for", "no hub id")


def test_a_failing_disk_is_exit_code_1(checkpoint, capsys, monkeypatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error", "tensor.bin")

    monkeypatch.setattr(jaxllama, "load", fail)
    assert command("generate", checkpoint, "a") == 1
    assert_one_line(capsys.readouterr().err, "Input/output error", "tensor.bin")


def test_a_failing_model_is_exit_code_1(checkpoint, capsys, monkeypatch):
    """Not the input's fault: the same command may succeed with another model or another device."""

    def fail(*_: Any, **__: Any) -> Any:
        raise NonFiniteLogitsError("the model produced NaN or infinity for this request")

    monkeypatch.setattr(jaxllama.Llama, "stream", fail)
    assert command("generate", checkpoint, "a") == 1
    assert_one_line(capsys.readouterr().err, "NaN")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("frobnicate",),
        ("generate",),
        ("generate", "x", "y", "--seed", "warm"),
        ("generate", "x", "y", "-q"),
        ("generate", "x", "y", "--dtype", "float8"),
        ("convert", "x"),
        ("convert", "x", "y", "--dtype", "float16"),
        ("convert", "x", "y", "--dtype", "\x1b[31m" + "x" * 5000),
        ("convert", "x", "y", "--quantize", "int4"),
        ("serve", "x", "--port", "many"),
        ("batch", "x"),
        ("plan", "x", "--rows", "few"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    known = args[:1] if args and args[0] != "frobnicate" else ()
    assert_one_line(error, f"See {' '.join(('jaxllama', *known))} --help")
    assert len(error) < 500


# ---- The command itself ----


def run(*args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, on one CPU device."""
    start = ["-m", "jaxllama"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *args],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_the_commands():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for name in ("convert", "serve", "batch", "generate", "plan"):
        assert name in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["convert", "serve", "batch", "generate", "plan"])
def test_every_command_explains_its_options(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: jaxllama {name}" in shown


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"jaxllama {jaxllama.__version__}\n"


def test_the_module_returns_main_s_exit_code(tmp_path):
    done = run("generate", str(tmp_path), "a", "--compilation-cache", "off")
    assert done.returncode == 2
    assert_one_line(done.stderr, "manifest.json")


# Several commands in one process, as if each came first: what they import of ours is imported again.
WITHOUT = """
import contextlib, io, json, sys
results = []
for missing, args in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.startswith("jaxllama_")]:
        del sys.modules[name]
    hidden = {name: sys.modules.get(name) for name in missing}
    sys.modules.update(dict.fromkeys(missing))
    from jaxllama.__main__ import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(args)
        except SystemExit as exit:
            code = exit.code
    results.append([code, out.getvalue(), err.getvalue()])
    for name, module in hidden.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
print(json.dumps(results))
"""


def run_without(*commands: tuple[list[str], list[str]]) -> list[tuple[int, str, str]]:
    """The exit code, output and errors of each command where some libraries are not installed."""
    done = run(json.dumps(commands), code=WITHOUT)
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def test_a_missing_extra_says_how_to_install_it(tmp_path):
    source, out = str(tmp_path / "model.gguf"), str(tmp_path / "out")
    Path(source).write_bytes(b"GGUF")
    cases = [
        ("aiohttp", ["serve", "somewhere"], "serve"),
        ("aiohttp", ["serve", "somewhere", "--port", "8001"], "serve"),
        ("pydantic", ["serve", "somewhere"], "serve"),
        ("aiohttp", ["batch", "in", "out", "--checkpoint", "somewhere"], "serve"),
        ("gguf", ["convert", source, out], "gguf"),
        ("gguf", ["convert", source, out, "--dtype", "float32"], "gguf"),
    ]
    done = run_without(*[([missing], args) for missing, args, _ in cases])
    for (_, _, extra), (code, _, err) in zip(cases, done, strict=True):
        assert code in (1, 2)
        assert_one_line(err, f"pip install 'jaxllama[{extra}]'")


def test_help_and_generate_need_no_extra(tmp_path):
    missing = ["aiohttp", "pydantic", "uvloop", "gguf", "safetensors", "matplotlib"]
    shown, generated = run_without((missing, ["--help"]), (missing, ["generate", str(tmp_path), "a"]))
    assert shown[0] == 0
    assert generated[0] == 2
    assert_one_line(generated[2], "manifest.json")


IMPORTED = """
import contextlib, io, sys
from jaxllama.__main__ import main

with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(sys.argv[1:])
assert "--max-rows" in out.getvalue()
print(*sys.modules)
"""


def test_a_command_imports_no_other():
    """Which took a second of every start."""
    done = run("serve", "--help", code=IMPORTED)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "jaxllama_serving.process.cli" in imported
    others = {"jaxllama_convert", "jaxllama_serving.batch", "jaxllama.plan", "jaxllama.llama.check", "flax", "aiohttp"}
    assert not imported & others
