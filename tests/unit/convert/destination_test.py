"""Where a checkpoint may not go is known before anything changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from jaxllama_convert import convert
from unit.weights.sources.sources import write_gguf, write_hf

from jaxllama.errors import ConversionError


def _everything(folder: Path) -> dict[str, object]:
    """Every path below with what it is: a link's target, a file's hash and time, a folder's time."""
    found: dict[str, object] = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else None
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def refuse(root: Path, src: Path, dst: Path, reason: str) -> None:
    """Checks that nothing below `root` changes, with and without force."""
    before = _everything(root)
    for force in (False, True):
        with pytest.raises(ConversionError, match=reason) as caught:
            convert(src, dst, force=force)
        assert "\n" not in str(caught.value)
        assert _everything(root) == before


@pytest.mark.parametrize(
    "dst", ["src", "src/out", "src/a/b/out", "src/../src/out", "link", "link/out", "src/tokenizer.json"]
)
def test_the_destination_is_not_in_the_source(tmp_path, dst):
    write_hf(tmp_path / "src")
    (tmp_path / "link").symlink_to("src")
    refuse(tmp_path, tmp_path / "src", tmp_path / dst, "inside the source")


@pytest.mark.parametrize("src", ["link", "link/.", "other/../link"])
def test_a_source_through_a_link_is_the_same_source(tmp_path, src):
    write_hf(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "other").mkdir()
    refuse(tmp_path, tmp_path / src, tmp_path / "real" / "out", "inside the source")


def test_a_checkpoint_that_holds_its_source_is_not_replaced(tmp_path):
    write_hf(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "out")
    write_hf(tmp_path / "out" / "inner")
    write_gguf(tmp_path / "out" / "model.gguf")
    (tmp_path / "link").symlink_to("out")
    for src in ("out/inner", "link/inner", "out/model.gguf", "link/model.gguf"):
        for dst in ("out", "link"):
            refuse(tmp_path, tmp_path / src, tmp_path / dst, "holds the source")


def test_the_cache_that_a_snapshot_belongs_to_is_the_source_too(tmp_path):
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc123"
    write_hf(snapshot)
    refuse(tmp_path, snapshot, tmp_path / "models--me--tiny" / "blobs" / "out", "inside the source")


def test_beside_the_source_is_fine(tmp_path):
    write_hf(tmp_path / "src")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "model.gguf")
    convert(tmp_path / "src", tmp_path / "src-out")
    convert(tmp_path / "gguf" / "model.gguf", tmp_path / "gguf" / "out")


@pytest.mark.parametrize(
    ("dst", "target"),
    [("link", "gone"), ("link", "gone/deeper"), ("link", "link"), ("a/link/out", "../gone"), ("a/link/out", "link")],
)
def test_a_link_that_leads_nowhere_is_not_followed(tmp_path, dst, target):
    write_hf(tmp_path / "src")
    (tmp_path / "a").mkdir()
    link = tmp_path / dst if dst == "link" else (tmp_path / dst).parent
    link.symlink_to(target)
    refuse(tmp_path, tmp_path / "src", tmp_path / dst, f"link to {target}, which leads to nothing")


def test_what_is_no_folder_is_not_replaced(tmp_path):
    write_hf(tmp_path / "src")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link", "pipe"):
        refuse(tmp_path, tmp_path / "src", tmp_path / name, "not a folder")
    with pytest.raises(ConversionError, match="not a folder"):
        convert(tmp_path / "src", "/dev/null", force=True)


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    write_hf(tmp_path / "src")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "link").symlink_to("disk/real")
    convert(tmp_path / "src", tmp_path / "link")
    convert(tmp_path / "src", tmp_path / "link", force=True)
    assert os.readlink(tmp_path / "link") == "disk/real"
    assert (tmp_path / "disk" / "real" / "manifest.json").exists()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["real"]
