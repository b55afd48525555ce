"""Laws of writing to buckets: complete when the last file is there, which one writer puts; a kill costs no work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import bucket
import pytest
from unit.weights.places.bucket_test import store as store

from jaxllama.errors import PlaceError, StoreError
from jaxllama.weights.places import lease
from jaxllama.weights.places.bucket import BucketPlace, open_bucket
from jaxllama.weights.places.upload import INCOMPLETE, open_upload

LAST = "manifest.json"
FILES = {f"params/{step}/{i}": bytes([i]) * 100 for step in "abc" for i in range(3)}


class Killed(BaseException):
    """What ends a process that no `except Exception` and no cleaning up sees."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.05)
    monkeypatch.setattr(lease, "POLL_S", 0.01)


def upload(url: str, *, force: bool = False, identity: Any = "one", files: dict[str, bytes] = FILES) -> int:
    """Writes `files` in steps. Returns how many of the steps were there."""
    with open_upload(url, LAST, force=force) as work:
        done = work.begin({"identity": identity})
        for step in "abc":
            names = [name for name in files if name.startswith(f"params/{step}/")]
            if step not in done:
                for name in names:
                    work.write(name, files[name])
                work.record(step, names, {"num": len(names)})
        work.finish(b'{"format": "x"}', owns=lambda name: name.startswith("params/"))
    return len(done)


def complete(files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {f"models/out/{name}": data for name, data in files.items()} | {
        "models/out/manifest.json": b'{"format": "x"}'
    }


def kill_at(monkeypatch: pytest.MonkeyPatch, request: int) -> None:
    """From that request on nothing that this process asks is done."""
    ask, count = BucketPlace._ask, iter(range(10**9))

    def ask_or_die(*args: Any, **how: Any) -> Any:
        if next(count) >= request:
            raise Killed
        return ask(*args, **how)

    monkeypatch.setattr(BucketPlace, "_ask", ask_or_die)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_what_is_written_is_there_and_nothing_else(store: bucket.Store, scheme: str) -> None:
    assert upload(f"{scheme}://models/out") == 0
    assert store.objects == complete()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_at_any_moment_and_resumed(store: bucket.Store, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    url, resumed = f"{scheme}://models/out", []
    for request in range(0, 60, 3):
        store.objects.clear()
        with monkeypatch.context() as patch:
            kill_at(patch, request)
            try:
                upload(url)
                break
            except Killed:
                assert store.objects.get("models/out/manifest.json") in (None, b'{"format": "x"}')
                if "models/out/manifest.json" in store.objects:
                    assert complete().items() <= store.objects.items()
        if "models/out/manifest.json" in store.objects:
            with pytest.raises(PlaceError, match="exists; give --force"):
                upload(url)
        else:
            resumed.append(upload(url))
        # A lock that nobody holds is all that may be left of one that was killed when all was done.
        store.objects.pop("models/out/.partial/lock", None)
        assert store.objects == complete()
    assert len(resumed) >= 8
    assert {0, 1, 2, 3} == set(resumed)
    assert resumed == sorted(resumed)


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [("s3", fault) for fault in ("500", "429", "412", "dropped", "lost", "short", "etag")]
    + [("gs", "412"), ("gs", "lost")],
)
def test_an_answer_to_a_write_that_is_wrong_once(store: bucket.Store, scheme: str, fault: str) -> None:
    # Of each kind: the lock, the marker, an object, the journal, the last file.
    for write in (0, 1, 2, 5, 14, 15):
        store.objects.clear()
        store.write_faults += [""] * write + [fault]
        try:
            upload(f"{scheme}://models/out")
        except (StoreError, PlaceError):
            # A refused condition may be another writer's doing; a lie about an ETag looks like a change.
            assert fault in ("412", "short", "etag")
            assert store.objects.get("models/out/manifest.json") in (None, b'{"format": "x"}')
            store.write_faults.clear()
            upload(f"{scheme}://models/out")
        store.write_faults.clear()
        assert store.objects == complete()


@pytest.mark.parametrize("fault", ["500", "429", "short"])
def test_a_listing_that_is_wrong_once(store: bucket.Store, fault: str) -> None:
    for listing in range(4):
        store.objects.clear()
        store.list_faults += [""] * listing + [fault]
        upload("s3://models/out")
        assert store.objects == complete()


def test_an_object_that_changes_meanwhile_is_found_and_written_again(store: bucket.Store) -> None:
    with open_upload("s3://models/out", LAST) as work:
        work.begin({"identity": "one"})
        for step in "ab":
            for i in range(3):
                work.write(f"params/{step}/{i}", FILES[f"params/{step}/{i}"])
            work.record(step, [f"params/{step}/{i}" for i in range(3)], {})
        store.objects["models/out/params/b/1"] = b"?"
        with pytest.raises(StoreError, match=r"params/b/1: 1 bytes .*, written were 100"):
            work.finish(b"{}")
    assert "models/out/manifest.json" not in store.objects
    assert upload("s3://models/out") == 1
    assert store.objects == complete()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_of_two_writers_one_is_refused(store: bucket.Store, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(lease, "STALE_S", 5.0)
    monkeypatch.setattr(lease, "RENEWAL_S", 0.05)
    with open_upload(f"{scheme}://models/out", LAST) as work:
        work.begin({"identity": "one"})
        with pytest.raises(StoreError, match=f"another process is writing it .process {os.getpid()} on"):
            upload(f"{scheme}://models/out", identity="two")
        work.write("params/a/0", b"1")
        work.finish(b"{}")
    assert store.objects == {"models/out/manifest.json": b"{}", "models/out/params/a/0": b"1"}


def test_of_many_that_take_a_stale_lock_over_one_does(store: bucket.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.take_lease(open_bucket("s3://models/out"), "lock")._stop.set()
    monkeypatch.setattr(lease, "RENEWAL_S", 0.01)
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    taken, refused = [], []

    def take() -> None:
        try:
            taken.append(lease.take_lease(open_bucket("s3://models/out"), "lock"))
        except StoreError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(taken), len(refused)) == (1, 3)
    assert taken[0].was_taken_over
    taken[0].release()
    assert store.objects == {}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_one_that_comes_back_after_its_lock_was_taken_over_completes_nothing(store: bucket.Store, scheme: str) -> None:
    url = f"{scheme}://models/out"
    with open_upload(url, LAST) as late:
        late.begin({"identity": "one"})
        late.write("params/a/0", b"of the first")
        late._lease._stop.set()
        with open_upload(url, LAST) as work:
            work.begin({"identity": "two"})
            # The first's last put, that was on its way when it was checked.
            assert late.place.create(LAST, b'{"format": "first"}') is None
            assert store.objects["models/out/manifest.json"] == INCOMPLETE
            work.write("params/a/0", b"of the second")
            work.finish(b"{}")
        with pytest.raises(StoreError, match="taken the lock over"):
            late.finish(b'{"format": "first"}')
    assert store.objects == {"models/out/manifest.json": b"{}", "models/out/params/a/0": b"of the second"}


def test_a_writer_whose_lock_cannot_be_renewed_writes_nothing(
    store: bucket.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_upload("s3://models/out", LAST) as work:
        work.begin({"identity": "one"})
        now = lease._now_s()
        monkeypatch.setattr(lease, "_now_s", lambda: now + 1000)
        store.write_faults += ["500"] * 100
        with pytest.raises(StoreError, match="gave up"):
            work.write("params/a/0", b"1")
        store.write_faults.clear()
    assert "models/out/params/a/0" not in store.objects


def test_the_lock_of_a_process_of_this_machine_that_has_ended_is_taken_over_at_once(
    store: bucket.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os; from jaxllama.weights.places.bucket import open_bucket; from jaxllama.weights.places import lease;"
        "lease.take_lease(open_bucket('s3://models/out'), 'lock'); os._exit(9)"
    )
    environ = {**os.environ, "AWS_ENDPOINT_URL": store.url}
    assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=60).returncode == 9
    assert json.loads(store.objects["models/out/lock"])["pid"] != os.getpid()
    monkeypatch.setattr(lease, "STALE_S", 60.0)
    taken = lease.take_lease(open_bucket("s3://models/out"), "lock")
    assert taken.was_taken_over
    taken.release()


def test_what_is_there_is_replaced_only_by_force(store: bucket.Store) -> None:
    upload("s3://models/out", files={**FILES, "params/c/gone": b"old"})
    before = dict(store.objects)
    with pytest.raises(PlaceError, match="s3://models/out: exists; give --force"):
        upload("s3://models/out", identity="two")
    assert store.objects == before
    store.objects["models/out/other/manifest.json"] = b"another model"
    upload("s3://models/out", force=True, identity="two")
    assert store.objects == complete() | {"models/out/other/manifest.json": b"another model"}


def test_a_folder_of_something_else_is_left_alone(store: bucket.Store) -> None:
    store.objects["models/out/holiday.jpg"] = b"precious"
    for force in (False, True):
        with pytest.raises(PlaceError, match=r"not empty \(holiday.jpg\) and has no manifest.json"):
            upload("s3://models/out", force=force)
    assert store.objects == {"models/out/holiday.jpg": b"precious"}


def test_other_work_starts_over(store: bucket.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 22)
        with pytest.raises(Killed):
            upload("s3://models/out")
    other = {name: data[::-1] + b"!" for name, data in FILES.items() if name != "params/a/2"}
    assert upload("s3://models/out", identity="two", files=other) == 0
    assert store.objects == complete(other)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_large_object_is_written_part_by_part(store: bucket.Store, scheme: str, tmp_path: Path) -> None:
    data = os.urandom(40 * 2**20)
    with open_upload(f"{scheme}://models/out", LAST) as work:
        work.begin({})
        work.write_parts("model.safetensors", (memoryview(data)[i : i + 2**20] for i in range(0, len(data), 2**20)))
        work.finish(b"{}")
    assert store.objects == {"models/out/manifest.json": b"{}", "models/out/model.safetensors": data}
    assert not store.uploads
