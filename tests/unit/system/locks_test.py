"""One process at a time, where the system has locks; everything else where it has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxllama.errors import CheckpointError, ConversionError
from jaxllama.system.locks import lock
from jaxllama.system.staging import is_ours, locked_folder, put_in_place, resolve_destination

WITHOUT_FCNTL = """
import importlib, pkgutil, sys
hidden = ["fcntl", "resource", "pwd", "grp", "termios"]
sys.modules.update(dict.fromkeys(hidden))
import jaxllama
for module in pkgutil.walk_packages(jaxllama.__path__, "jaxllama."):
    importlib.import_module(module.name)
for name in jaxllama.__all__:
    getattr(jaxllama, name)
import jaxllama_convert.staging
from pathlib import Path
from jaxllama.system.staging import locked_folder
with locked_folder(Path(sys.argv[1]) / "root"):
    pass
assert not any(sys.modules[name] for name in hidden)
"""


def test_every_module_can_be_imported_where_there_is_no_fcntl(tmp_path: Path) -> None:
    """As on Windows, whose own locks take its place there."""
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())


def test_a_lock_is_one_s_until_its_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as first, (tmp_path / "file").open("w") as second:
        lock(first)
        with pytest.raises(BlockingIOError):
            lock(second.fileno())
        first.close()
        lock(second)


def test_a_locked_folder_goes_unless_it_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "a" / "root"
    with locked_folder(root):
        (root / "x").touch()
        with pytest.raises(BlockingIOError), locked_folder(root):
            pass
        assert (root / "x").exists(), "the second one has removed what is the first one's"
    assert not root.exists()
    with locked_folder(root, keep=(root / "x").exists):
        (root / "x").touch()
    assert (root / "x").exists()
    assert is_ours(root)
    (root / "lock").unlink()
    assert not is_ours(root)


def test_a_folder_is_put_in_the_place_of_another(tmp_path: Path) -> None:
    for name in ("new", "there", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "x").touch()
    (tmp_path / "there" / "y").touch()
    put_in_place(tmp_path / "new", tmp_path / "there", old=tmp_path / "old")
    assert (tmp_path / "there" / "x").exists()
    assert (tmp_path / "old" / "y").exists()
    put_in_place(tmp_path / "there", tmp_path / "empty")
    assert (tmp_path / "empty" / "x").exists()
    with pytest.raises(OSError, match="not empty"):
        put_in_place(tmp_path / "old", tmp_path / "empty")


@pytest.mark.parametrize("error", [ConversionError, CheckpointError])
def test_a_destination_is_no_link_to_nothing(tmp_path: Path, error: type[Exception]) -> None:
    (tmp_path / "link").symlink_to("gone")
    for name in ("link", "link/inner"):
        with pytest.raises(error, match="link to gone, which leads to nothing"):
            resolve_destination(tmp_path / name, error)  # type: ignore[arg-type]
    (tmp_path / "gone").mkdir()
    assert resolve_destination(tmp_path / "link" / "inner", error) == tmp_path / "gone" / "inner"  # type: ignore[arg-type]
