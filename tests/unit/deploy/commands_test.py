"""Every `jaxllama` command in a deploy file or a README is one that the program takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from jaxllama_serving.process.cli import make_config
from unit.deploy.files import (
    DOCKERFILE,
    READMES,
    UNIT,
    Command,
    command_of_container,
    command_of_dockerfile,
    command_of_unit,
    commands,
    commands_of_readme,
    flags_in_prose,
    option_names,
    parse,
)


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_is_one_that_the_program_takes(command: Command):
    args = parse(command)
    if args.command == "serve":
        # A key file lies on another machine; everything else must make a config.
        args.api_key_file = None
        make_config(args, None)


def test_commands_are_found_everywhere():
    found = [command.where for command in commands()]
    for where in (DOCKERFILE.name, UNIT.name, "replicas.yaml template", "slice.yaml leaderTemplate", "README.md"):
        assert where in found
    assert sum(len(list(commands_of_readme(path))) for path in READMES) >= 40


@pytest.mark.parametrize("path", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_flag_that_a_readme_names_exists(path: Path):
    assert flags_in_prose(path) <= option_names()


def test_a_readme_with_a_wrong_command_or_flag_is_found(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "Run `jaxllama serve ckpt --prot 1` or `jaxllama serve`, with `--drain N` or `--port`.\n"
        "```sh\nsudo /opt/jaxllama/bin/jaxllama serve ckpt \\\n    --por 8000  # a comment\n```\n"
    )
    fenced, inline = commands_of_readme(readme)
    assert fenced.args == ("serve", "ckpt", "--por", "8000")
    assert inline.args == ("serve", "ckpt", "--prot", "1")
    with pytest.raises(AssertionError, match="--prot"):
        parse(inline)
    assert flags_in_prose(readme) - option_names() == {"--drain"}


def test_a_deploy_file_with_a_wrong_flag_is_found():
    unit = UNIT.read_text().replace("--drain-timeout", "--drain-time-out")
    dockerfile = DOCKERFILE.read_text().replace('"--port"', '"--prt"')
    container = {"args": ["/checkpoints/model", "--served-model-names=default"]}
    for command in (
        command_of_unit(unit),
        command_of_dockerfile(dockerfile),
        command_of_container("x", container),
    ):
        with pytest.raises(AssertionError, match="refused"):
            parse(command)
