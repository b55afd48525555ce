"""Imports go strictly down, heavy libraries stay in their corners, and what is public says so."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import jaxllama

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "jaxllama": ROOT / "jaxllama",
    "jaxllama_convert": ROOT / "convert" / "jaxllama_convert",
    "jaxllama_serving": ROOT / "serving" / "jaxllama_serving",
}

# docs/architecture.md, "The tree": a module imports from layers above its own line and from its own package only.
LAYERS = (
    ("jaxllama.errors",),
    ("jaxllama.model.config", "jaxllama.system", "jaxllama.hosts.link", "jaxllama.model.platforms.startup"),
    ("jaxllama.engine.compilation",),
    (
        "jaxllama.model.params",
        "jaxllama.model.rope",
        "jaxllama.model.mesh",
        "jaxllama.text",
        "jaxllama.hosts.group",
        "jaxllama.hosts.relay",
        "jaxllama.model.platforms.chips",
        "jaxllama.weights.places",
    ),
    (
        "jaxllama.hosts.watch",
        "jaxllama.model.int8",
        "jaxllama.weights.arrays",
        "jaxllama.weights.parts",
        "jaxllama.decode.controls",
        "jaxllama.decode.steering",
    ),
    ("jaxllama.model.cache", "jaxllama.decode.params"),
    ("jaxllama.model.native", "jaxllama.decode.sampling", "jaxllama.decode.prompts", "jaxllama.decode.drafts"),
    ("jaxllama.model.linear",),
    ("jaxllama.model.attention",),
    ("jaxllama.model.platforms",),
    ("jaxllama.model.forward", "jaxllama.weights.forms", "jaxllama.weights.sources"),
    ("jaxllama.hosts.lockstep", "jaxllama.weights.reading", "jaxllama.model.dense"),
    ("jaxllama.decode.state", "jaxllama.weights.checkpoint"),
    ("jaxllama.decode.draft_model",),
    ("jaxllama.decode.steps",),
    ("jaxllama.decode.scoring", "jaxllama.decode.functional"),
    (
        "jaxllama.engine",
        "jaxllama.weights.loading",
        "jaxllama.weights.opening",
        "jaxllama.weights.saving",
    ),
    ("jaxllama.plan", "jaxllama.system.doctor", "jaxllama.weights.exporting"),
    ("jaxllama.llama", "jaxllama"),
    ("jaxllama_convert", "jaxllama_serving", "jaxllama.__main__"),
)
# Within the third layer mesh reads the table of parameters.
ALLOWED_UP_OR_ACROSS = {
    ("jaxllama.model.mesh", "jaxllama.model.params"),
    ("jaxllama", "jaxllama.llama"),
}
# Library to the modules that may import it.
CORNERS = {
    "aiohttp": ("jaxllama_serving",),
    "uvloop": ("jaxllama_serving",),
    "huggingface_hub": ("jaxllama.weights.places.hub",),
    "obstore": ("jaxllama.weights.places.bucket",),
    "http": ("jaxllama.weights.places.http_ranges",),
    "httpx": (),
    "httpx2": (),
    "requests": (),
    "urllib3": (),
    "pydantic": ("jaxllama_serving",),
    "prometheus_client": ("jaxllama_serving.metrics",),
    "safetensors": (),
    "gguf": ("jaxllama.weights.sources",),
    "orbax": ("jaxllama.weights.arrays.orbax_tree",),
    "tokenizers": ("jaxllama.text",),
    "sentencepiece": ("jaxllama.text",),
    "llguidance": ("jaxllama.text",),
    "jinja2": ("jaxllama.text",),
    "matplotlib": ("jaxllama.plan.plot", "jaxllama_serving.client.report"),
    "blake3": ("jaxllama.system.hashing",),
    "lm_eval": (),
    "flax": ("jaxllama.model.forward", "jaxllama.model.linear"),
}
WITHOUT_JAX = (
    "jaxllama.errors",
    "jaxllama.model.config",
    "jaxllama.text",
    "jaxllama.decode.controls",
    "jaxllama.decode.params",
    "jaxllama.decode.steering",
    "jaxllama.engine.scheduling",
    "jaxllama_serving.protocol",
)
# The applications use what `jaxllama` exports, its errors and text; the server also the controls of sampling, the
# processes of many hosts and progress bars, the converter what checkpoints are made of.
PUBLIC_TO = {
    "jaxllama_serving": (
        "jaxllama",
        "jaxllama.errors",
        "jaxllama.text",
        "jaxllama.decode.controls",
        "jaxllama.decode.params",
        "jaxllama.hosts.group",
        "jaxllama.system",
        "jaxllama.weights.opening",
        "jaxllama.weights.places",
    ),
    "jaxllama_convert": (
        "jaxllama",
        "jaxllama.errors",
        "jaxllama.text",
        "jaxllama.system",
        "jaxllama.model.config",
        "jaxllama.model.params",
        "jaxllama.model.int8",
        "jaxllama.weights.arrays",
        "jaxllama.weights.checkpoint",
        "jaxllama.weights.exporting",
        "jaxllama.weights.opening",
        "jaxllama.weights.places",
        "jaxllama.weights.sources",
    ),
}


@dataclass(frozen=True)
class Import:
    """`source` imports `name` (None: the module itself) from `target`."""

    source: str
    target: str
    name: str | None
    line: int

    def __str__(self) -> str:
        what = self.target if self.name is None else f"{self.name} from {self.target}"
        return f"{self.source}:{self.line} imports {what}"


@functools.cache
def modules() -> tuple[tuple[str, Path], ...]:
    return tuple(_walk())


def _walk() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@functools.cache
def module_names() -> frozenset[str]:
    return frozenset(name for name, _ in modules())


def imports_of(module: str, path: Path) -> Iterator[Import]:
    """Every import, also inside functions and under TYPE_CHECKING."""
    known = module_names()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield Import(module, inner, None, node.lineno)
                else:
                    yield Import(module, node.module, alias.name, node.lineno)


@functools.cache
def all_imports() -> tuple[Import, ...]:
    return tuple(item for module, path in modules() for item in imports_of(module, path))


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> tuple[int, str]:
    """The layer's number and the entry it matched, the longest that fits."""
    entries = [(len(entry), number, entry) for number, layer in enumerate(LAYERS) for entry in layer]
    fitting = [(length, number, entry) for length, number, entry in entries if is_within(module, entry)]
    if module != "jaxllama":
        fitting = [item for item in fitting if item[2] != "jaxllama"]
    assert fitting, f"{module} is in no layer: the table above names them"
    _, number, entry = max(fitting)
    return number, entry


def test_the_walk_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        "import aiohttp\nfrom jaxllama.model import config\nfrom jaxllama import load\n"
        "if 1:\n    from jaxllama.engine.scheduling import scheduler as s\n"
        "def f():\n    import jax.numpy as jnp\n    from jaxllama.errors import ConfigError\n"
    )
    found = {(item.target, item.name) for item in imports_of("sample", path)}
    assert found == {
        ("aiohttp", None),
        ("jaxllama.model.config", None),
        ("jaxllama", "load"),
        ("jaxllama.engine.scheduling.scheduler", None),
        ("jax.numpy", None),
        ("jaxllama.errors", "ConfigError"),
    }
    assert len(module_names()) > 30


def test_imports_go_strictly_down():
    wrong = []
    for item in all_imports():
        if not is_within(item.target, "jaxllama") or item.source.startswith(("jaxllama_", "jaxllama.__main__")):
            continue
        (low, source), (high, target) = layer_of(item.source), layer_of(item.target)
        if source != target and high >= low and (source, target) not in ALLOWED_UP_OR_ACROSS:
            wrong.append(str(item))
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle():
    """Inside functions and under TYPE_CHECKING too. A package's `__init__` may gather what its modules define."""
    known = module_names()
    below: dict[str, set[str]] = {name: set() for name in known}
    for item in all_imports():
        if item.target in known and not is_within(item.source, item.target):
            below[item.source].add(item.target)
    circles: list[str] = []
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circles.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(below[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in sorted(known):
        walk(name, ())
    assert not circles, "\n".join(circles)


def test_text_is_below_sampling_and_the_device():
    below = ("jaxllama.errors", "jaxllama.system", "jaxllama.text")
    wrong = [
        str(item)
        for item in all_imports()
        if is_within(item.source, "jaxllama.text")
        and is_within(item.target, "jaxllama")
        and not any(is_within(item.target, package) for package in below)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", CORNERS)
def test_a_library_stays_in_its_corner(library):
    users = [item for item in all_imports() if is_within(item.target, library)]
    wrong = [str(item) for item in users if not any(is_within(item.source, corner) for corner in CORNERS[library])]
    assert not wrong, "\n".join(wrong)


def test_host_decisions_do_without_jax():
    wrong = [
        str(item)
        for item in all_imports()
        if any(is_within(item.source, module) for module in WITHOUT_JAX)
        and item.target.split(".")[0] in ("jax", "jaxlib", "flax")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_applications_never_import_each_other():
    apps = ("jaxllama_convert", "jaxllama_serving")
    wrong = [
        str(item)
        for item in all_imports()
        for own, other in (apps, apps[::-1])
        if is_within(item.source, own) and is_within(item.target, other)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("app", PUBLIC_TO)
def test_the_applications_use_public_names_only(app):
    wrong = []
    for item in all_imports():
        if not is_within(item.source, app) or not is_within(item.target, "jaxllama"):
            continue
        names = [*item.target.split("."), item.name or ""]
        is_exported = item.target != "jaxllama" or item.name is None or item.name in jaxllama.__all__
        inner = [module for module in PUBLIC_TO[app] if module != "jaxllama"]
        is_public = item.target == "jaxllama" or any(is_within(item.target, module) for module in inner)
        if not is_public or not is_exported or any(name.startswith("_") for name in names):
            wrong.append(str(item))
    assert not wrong, "\n".join(wrong)


def test_private_names_stay_in_their_module():
    wrong = [
        str(item)
        for item in all_imports()
        if is_within(item.target.split(".")[0], "jaxllama")
        and item.name is not None
        and item.name.startswith("_")
        and not item.name.startswith("__")
    ]
    assert not wrong, "\n".join(wrong)


def test_all_is_complete_and_small():
    tree = ast.parse((PACKAGES["jaxllama"] / "__init__.py").read_text())
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    # What type checkers see, what is exported and what is imported on first use are the same.
    assert set(jaxllama.__all__) == set(imported) <= set(dir(jaxllama))
    assert imported == jaxllama._MODULE_OF
    assert list(jaxllama.__all__) == sorted(jaxllama.__all__, key=lambda name: (name[0].islower(), name))
    assert len(jaxllama.__all__) <= 25
    for name in jaxllama.__all__:
        assert getattr(jaxllama, name).__doc__, f"{name} has no docstring"


def test_importing_the_package_imports_nothing_and_changes_nothing():
    code = """
import os, sys
before = dict(os.environ)
import jaxllama
assert "jax" not in sys.modules and dict(os.environ) == before
assert jaxllama.errors.ConfigError and jaxllama.SamplingParams().temperature == 1.0
try:
    jaxllama.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_module_has_a_docstring():
    without = [
        name
        for name, path in modules()
        if not any(part.startswith("_") and part != "__main__" for part in name.split("."))
        and path.read_text().strip()
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not without


def test_every_module_of_the_library_can_be_imported():
    for module in pkgutil.walk_packages(jaxllama.__path__, "jaxllama."):
        importlib.import_module(module.name)
        assert module.name in sys.modules


def test_files_stay_small_and_have_telling_names():
    too_long = {name: n for name, path in modules() if (n := len(path.read_text().splitlines())) > 500}
    assert not too_long
    vague = {"utils", "helpers", "common", "misc"}
    assert not [name for name in module_names() if name.split(".")[-1] in vague]


def folders() -> list[Path]:
    """Every folder of the packages."""
    found = [path for root in PACKAGES.values() for path in (root, *root.rglob("*")) if path.is_dir()]
    return [path for path in found if path.name != "__pycache__"]


def test_a_folder_shows_what_it_holds():
    """At most twelve entries beside `__init__.py`, which says in one line what lives there."""
    crowded, silent = {}, []
    for folder in folders():
        entries = [path.name for path in folder.iterdir() if path.name not in ("__pycache__", "__init__.py")]
        if len(entries) > 12:
            crowded[str(folder.relative_to(ROOT))] = len(entries)
        init = folder / "__init__.py"
        if init.exists() and not (ast.get_docstring(ast.parse(init.read_text())) or "").splitlines()[:1]:
            silent.append(str(init.relative_to(ROOT)))
    assert not crowded
    assert not silent


def test_the_tree_in_the_documentation_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    described: list[str] = []
    package = ""
    for line in text.strip().splitlines():
        name = line.split()[0]
        package = package if line.startswith(" ") else name
        described.append(name if name == package else package + name)
    missing = [path for path in described if not (ROOT / path).exists()]
    assert not missing, f"docs/architecture.md, 'The tree', names what is not there: {', '.join(missing)}"
    undescribed = {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders()} - set(described)
    # What a folder of the tree keeps to itself.
    undescribed = {path for path in undescribed if path.count("/") < 4}
    assert not undescribed, f"docs/architecture.md, 'The tree', needs a line for {', '.join(sorted(undescribed))}"


DESCRIPTIONS = ("docs/architecture.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("page", DESCRIPTIONS)
def test_files_and_names_in_the_descriptions_are_there(page):
    """Paths (`decode/steps.py`, from anywhere) and dotted names (`steps.prefill`, from any folder of ours)."""
    quoted = {name for line in (ROOT / page).read_text().splitlines() for name in re.findall("`([^` ]+)`", line)}
    paths = {name for name in quoted if re.fullmatch(r"[\w*-][\w./*-]*(\.(py|md|txt|toml)|/)", name)}
    names = {name for name in quoted - paths if re.fullmatch(r"[a-z]\w*(\.\w+)+", name)}
    assert (len(paths), len(names)) > (10, 0), "the patterns no longer find what is quoted"
    made = {".cache/", "models/"}
    roots = [ROOT, *PACKAGES.values()]
    missing = {path for path in paths - made if not any(_is_there(root, path) for root in roots)}
    missing |= {name for name in names if not any(_resolves(module, name) for module in module_names())}
    assert not missing, f"{page} names what is not there: {', '.join(sorted(missing))}"


def _is_there(root: Path, path: str) -> bool:
    return any(root.glob(path)) or (root != ROOT and any(root.rglob(path)))


def _resolves(module: str, name: str) -> bool:
    """Whether `module` is what `name` begins with (by its last parts), and has the rest."""
    # `llama` is what `load` returns.
    name = re.sub("^llama[.]", "llama.Llama.", name)
    first, *rest = name.split(".")
    if module.split(".")[-1] != first and module != first:
        return False
    while rest and f"{module}.{rest[0]}" in module_names():
        module = f"{module}.{rest.pop(0)}"
    found = importlib.import_module(module)
    for part in rest:
        fields = getattr(found, "__dataclass_fields__", {})
        if not hasattr(found, part) and part not in fields:
            return False
        found = getattr(found, part, None)
    return True


def test_every_grant_is_used():
    """A library's corner that nobody in it imports any more is closed."""
    unused = [
        (library, corner)
        for library, corners in CORNERS.items()
        for corner in corners
        if not any(is_within(item.source, corner) and is_within(item.target, library) for item in all_imports())
    ]
    assert not unused


def test_the_errors_are_the_documented_tree():
    """The docstring of errors.py draws every exception under its base."""
    from jaxllama import errors

    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        stripped = line.lstrip("│├└─ ")
        if stripped.split(" ")[0].endswith("Error"):
            drawn.append(((len(line) - len(stripped)) // 4, stripped.split(" ")[0]))
    bases = {}
    for index, (depth, name) in enumerate(drawn):
        above = [other for level, other in drawn[:index] if level == depth - 1]
        bases[name] = above[-1] if above else "Exception"
    defined = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert bases == defined
