"""The files of serving/deploy, and every `jaxllama` command that they, the READMEs and the documentation hold."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import documentation
import yaml

from jaxllama.__main__ import _parser

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "serving" / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
UNIT = DEPLOY / "jaxllama.service"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCUMENTS = tuple(ROOT / page for page in documentation.PAGES if page.startswith("docs/"))
READMES = (ROOT / "README.md", ROOT / "serving" / "README.md", ROOT / "convert" / "README.md", *DOCUMENTS)

_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Values that the cluster fills in, by the type that their flag wants.
_VARIABLES = {"LWS_LEADER_ADDRESS": "leader.example", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "1"}


@dataclass(frozen=True)
class Command:
    """`jaxllama ARGS…`, and where it stands."""

    where: str
    args: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: jaxllama {shlex.join(self.args)[:60]}"


def parse(command: Command) -> argparse.Namespace:
    """Parses by the real parser. Raises: AssertionError naming the command, if it is refused."""
    try:
        return _parser().parse_args(list(command.args))
    except SystemExit as error:
        raise AssertionError(f"{command} is refused (exit code {error.code})") from None


def commands_of_readme(path: Path) -> Iterator[Command]:
    """Those in fenced blocks and in backticks. A bare `jaxllama COMMAND` is a name, not a command."""
    text = path.read_text()
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r"\s*(\$ )?(sudo |\S+/)*jaxllama ", line):
                continue
            words = shlex.split(line.split("&&")[0].split(" | ")[0], comments=True)
            start = next(index for index, word in enumerate(words) if Path(word).name == "jaxllama")
            yield Command(path.name, tuple(words[start + 1 :]))
    for span in _INLINE.findall(_FENCE.sub("", text)):
        words = shlex.split(span) if span.startswith("jaxllama ") else []
        if len(words) > 2 and "--help" not in words and "…" not in span:
            yield Command(path.name, tuple(words[1:]))


def command_of_unit(text: str) -> Command:
    """ExecStart's command."""
    lines = text.replace("\\\n", " ").splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("ExecStart=")).removeprefix("ExecStart="))
    assert Path(words[0]).name == "jaxllama", words[0]
    return Command(UNIT.name, tuple(words[1:]))


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Each instruction's keyword and the rest of it, on one line."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\s*\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined)]


def command_of_dockerfile(text: str) -> Command:
    """ENTRYPOINT with CMD: what `docker run` without arguments starts."""
    found = dict(instructions(text))
    program, *args = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    assert program == "jaxllama", program
    return Command(DOCKERFILE.name, tuple(args))


def command_of_container(where: str, container: dict[str, Any]) -> Command:
    """A container's arguments, with the variables filled in, behind the entry point or a shell that execs it."""
    if "command" in container:
        shell, option, script, *name = container["command"]
        assert (shell, option) == ("sh", "-c"), container["command"]
        assert script.endswith('exec jaxllama serve "$@"'), script
        # sh takes the first argument after the script as $0.
        assert name == ["serve"], name
    args = [re.sub(r"\$\((\w+)\)", lambda match: _VARIABLES[match[1]], arg) for arg in container["args"]]
    return Command(where, ("serve", *args))


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of one manifest."""
    return list(yaml.safe_load_all(path.read_text()))


def pod_templates(obj: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """An object's pod templates by name; empty for objects that have none."""
    spec = obj.get("spec", {})
    found = {"template": spec.get("template")} | {
        name: spec.get("leaderWorkerTemplate", {}).get(name) for name in ("leaderTemplate", "workerTemplate")
    }
    return {name: template for name, template in found.items() if template is not None}


def commands() -> Iterator[Command]:
    """All of them."""
    yield command_of_dockerfile(DOCKERFILE.read_text())
    yield command_of_unit(UNIT.read_text())
    for path in MANIFESTS:
        for obj in documents(path):
            for name, template in pod_templates(obj).items():
                for container in template["spec"]["containers"]:
                    yield command_of_container(f"{path.name} {name}", container)
    for path in READMES:
        yield from commands_of_readme(path)


def option_names() -> set[str]:
    """Every flag of every `jaxllama` command."""
    parser = _parser()
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                names |= set(command._option_string_actions)
    return names


def flags_in_prose(path: Path) -> set[str]:
    """The flags that a README names in backticks, outside commands of other programs."""
    spans = [span for span in _INLINE.findall(_FENCE.sub("", path.read_text())) if span.startswith("--")]
    return {re.split(r"[ =]", part)[0] for span in spans for part in span.split("/") if part.startswith("--")}
