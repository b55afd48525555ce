"""What JAX is told before it looks for devices: not to look for a TPU where there is none, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest

from jaxllama.model.platforms import startup


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with libtpu, without plugins, whose user has said nothing."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setattr(startup, "may_have_tpu", lambda: False)
    monkeypatch.setattr(startup, "has_libtpu", lambda: True)
    monkeypatch.setattr(startup, "has_jax_plugins", lambda: False)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.usefixtures("unset")
def test_without_a_tpu_jax_does_not_load_libtpu():
    for _ in range(2):
        startup.prepare_jax()
        assert jax.config.jax_platforms == "cpu"


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(("name", "answer"), [("may_have_tpu", True), ("has_libtpu", False), ("has_jax_plugins", True)])
def test_with_a_tpu_without_libtpu_and_with_plugins_jax_decides(name, answer, monkeypatch):
    monkeypatch.setattr(startup, name, lambda: answer)
    startup.prepare_jax()
    assert jax.config.jax_platforms is None


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("given", ["", "tpu", "cuda,cpu"])
def test_what_the_user_set_stays(given):
    jax.config.update("jax_platforms", given)
    startup.prepare_jax()
    assert jax.config.jax_platforms == given


@pytest.mark.parametrize(
    ("files", "environ", "want"),
    [
        ([], {}, False),
        (["null", "nvidia0", "nvidiactl", "dri"], {"CUDA_VISIBLE_DEVICES": "0"}, False),
        # JAX and libtpu set these themselves, where there is no TPU too.
        ([], {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "/libtpu.so", "LIBTPU_INIT_ARGS": "--x"}, False),
        ([], {"TPU_NAME": ""}, False),
        (["accel0"], {}, True),
        (["accel"], {}, True),
        (["vfio/0", "vfio/vfio"], {}, True),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ([], {"TPU_NAME": "local"}, True),
    ],
)
def test_device_files_and_the_environment_hint_at_a_tpu(files, environ, want, tmp_path):
    (tmp_path / "dev").mkdir()
    for name in files:
        path = tmp_path / "dev" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert startup.may_have_tpu(tmp_path, environ) == want


def test_a_plugin_is_found_as_jax_finds_it(tmp_path, monkeypatch):
    """By its entry point, or in the namespace package `jax_plugins`."""
    monkeypatch.setattr(startup, "entry_points", lambda group: [group])
    assert startup.has_jax_plugins()
    monkeypatch.setattr(startup, "entry_points", lambda group: [])
    (tmp_path / "jax_plugins").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not startup.has_jax_plugins()
    (tmp_path / "jax_plugins" / "mine").mkdir()
    (tmp_path / "jax_plugins" / "mine" / "__init__.py").touch()
    assert startup.has_jax_plugins()


def test_libtpu_is_found_where_the_environment_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert not startup.has_libtpu()
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/libtpu.so")
    assert startup.has_libtpu()


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, "--xla_tpu_impure_use_large_2nd_minor_layout_for_x16=false"),
        ("--other=1", "--other=1 --xla_tpu_impure_use_large_2nd_minor_layout_for_x16=false"),
        ("--xla_tpu_impure_use_large_2nd_minor_layout_for_x16=true",) * 2,
    ],
)
def test_libtpu_is_told_to_keep_tiles_unless_the_user_says_otherwise(monkeypatch, given, want):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)  # `make_mesh` may have set it
    if given is not None:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    for _ in range(2):
        startup.keep_weights_as_they_are()
        assert os.environ["LIBTPU_INIT_ARGS"] == want
