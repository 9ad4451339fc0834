"""Objects in a store that answers badly, and their bounded local copies."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from full_stack_transformer import object_storage
from full_stack_transformer.errors import InputError, MachineError, MissingExtraError, UsageError
from full_stack_transformer.object_cache import CacheFullError, ObjectCache
from full_stack_transformer.object_storage import (
    ObjectPath,
    ObjectStore,
    check_url,
    open_store,
    url_of,
)
from tests.object_store import BUCKET, S3Server


@pytest.fixture
def store(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The bucket; waits between attempts are short."""
    monkeypatch.setattr(object_storage, "_FIRST_WAIT_SECONDS", 0.001)
    return open_store(f"s3://{BUCKET}/root", "--datasets_root")


def test_a_path_with_a_scheme_is_a_url_again() -> None:
    assert url_of(Path("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert url_of(Path("data/datasets")) is None
    assert url_of(Path("/s3:/bucket")) is None
    assert str(ObjectPath("s3://bucket") / "a") == "s3://bucket/a"
    assert f"{ObjectPath('s3://bucket/a').parent}" == "s3://bucket"


@pytest.mark.parametrize("url", ["file:///etc", "http://host/x", "ftp://host/x", "local://x/y"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"--datasets_root: .* use s3:// \(package s3fs\)"):
        check_url(url, "--datasets_root")


def test_credentials_in_a_url_are_refused_without_repeating_them() -> None:
    with pytest.raises(UsageError) as caught:
        check_url("s3://key:secret@bucket/x", "--datasets_root")
    assert "secret@" not in str(caught.value)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingExtraError, match="pip install gcsfs"):
        check_url("gs://bucket/x", "--datasets_root")


def test_objects_come_back_through_errors_cuts_and_lost_answers(
    store: ObjectStore, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "_PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(object_storage, "_NUM_ATTEMPTS", 12)
    content = os.urandom(1_000_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    s3.faults.probability, s3.faults.kinds = 0.3, ("500", "503", "cut", "lost", "slow")
    s3.faults.slow_seconds = 0.02
    store.put_file(path, "a/b.npy")
    store.put("a/c.json", b"{}")
    assert store.read("a/b.npy") == content
    assert store.names() == ["a/b.npy", "a/c.json"]
    assert store.folders() == ["a"]
    path.write_bytes(b"")
    store.download("a/b.npy", path, len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    store.remove("a/b.npy")
    assert not store.exists("a/b.npy")
    assert len(s3.faults.failed) > 3


def test_a_large_object_is_complete_or_absent(
    store: ObjectStore, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(110 << 20)  # s3fs sends parts of 50 MiB from 100 MiB on
    monkeypatch.setattr(object_storage, "_NUM_ATTEMPTS", 1)
    s3.faults.probability, s3.faults.kinds, s3.faults.only = 1.0, ("500",), "partNumber=2"
    with pytest.raises(MachineError, match="writing s3://bucket/root/large failed"):
        store.put_file(path, "large")
    assert not store.exists("large")
    assert any(request.startswith("DELETE") for request in s3.faults.requests), "not aborted"
    s3.faults.probability = 0.0
    store.put_file(path, "large")
    assert store.size("large") == 110 << 20


def test_one_of_many_writers_creates_an_object(
    store: ObjectStore, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "_NUM_ATTEMPTS", 12)
    s3.faults.probability, s3.faults.kinds = 0.3, ("lost", "500")
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda own=own: found.append(store.create("claim", own)))
        for own in (b"1", b"2", b"3", b"4")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, False, False, True]


def test_an_error_names_the_object_and_no_secret(store: ObjectStore, s3: S3Server) -> None:
    with pytest.raises(InputError, match="s3://bucket/root/absent does not exist"):
        store.read("absent")
    s3.faults.probability, s3.faults.kinds = 1.0, ("refused",)
    with pytest.raises(MachineError) as caught:
        store.put("x", b"1")
    assert "s3://bucket/root/x" in str(caught.value) and "credentials" in str(caught.value)
    assert "secret-of-a-test" not in str(caught.value)
    s3.faults.kinds = ("500",)
    with pytest.raises(MachineError, match="failed, tried 6 times: InternalError"):
        store.put("x", b"1")


def _put(store: ObjectStore, name: str, size: int = 1000) -> tuple[int, str]:
    content = hashlib.sha256(name.encode()).digest() * (size // 32 + 1)
    content = content[:size]
    store.put(name, content)
    return size, hashlib.sha256(content).hexdigest()


def test_the_cache_stays_below_its_bound_and_keeps_what_is_in_use(
    store: ObjectStore, tmp_path: Path
) -> None:
    cache = ObjectCache(tmp_path / "cache", 3500)
    facts = {name: _put(store, name) for name in "abcdef"}
    first = cache.fetch(store, "a", size=facts["a"][0], sha256=facts["a"][1])
    for name in "bcdef":
        copy = cache.fetch(store, name, size=facts[name][0], sha256=facts[name][1])
        assert hashlib.sha256(copy.path.read_bytes()).hexdigest() == facts[name][1]
        copy.close()
        assert cache.num_bytes <= 3500
    assert first.path.is_file()
    held = [cache.fetch(store, name, size=1000, sha256=facts[name][1]) for name in "ef"]
    with pytest.raises(
        CacheFullError, match=r"3,000 bytes in use .* --data_cache_bytes 3,500; raise it"
    ):
        cache.fetch(store, "b", size=1000, sha256=facts["b"][1])
    for copy in (first, *held):
        copy.close()
    cache.fetch(store, "b", size=1000, sha256=facts["b"][1]).close()


def test_what_a_killed_process_began_makes_room(store: ObjectStore, tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "cache", 2500)
    size, sha256 = _put(store, "a")
    cache.fetch(store, "a", size=size, sha256=sha256).close()
    left = tmp_path / "cache" / "objects" / "partial-left"
    left.write_bytes(bytes(1000))
    other = _put(store, "b")
    cache.fetch(store, "b", size=other[0], sha256=other[1]).close()
    assert not left.exists() and cache.num_bytes == 2000


def test_other_content_than_described_is_refused_and_not_kept(
    store: ObjectStore, tmp_path: Path
) -> None:
    cache = ObjectCache(tmp_path / "cache", 5000)
    _put(store, "a")
    with pytest.raises(InputError, match="holds other content than described"):
        cache.fetch(store, "a", size=1000, sha256="0" * 64)
    assert cache.num_bytes == 0


def test_many_readers_fetch_an_object_once(
    store: ObjectStore, s3: S3Server, tmp_path: Path
) -> None:
    size, sha256 = _put(store, "a")
    copies = []
    s3.faults.requests.clear()

    def read() -> None:
        cache = ObjectCache(tmp_path / "cache", 5000)
        copies.append(cache.fetch(store, "a", size=size, sha256=sha256))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({copy.path for copy in copies}) == 1
    assert len([one for one in s3.faults.requests if one.startswith("GET")]) == 1


def test_a_local_copy_is_of_the_version_that_is_there(store: ObjectStore, tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "cache", 5000)
    for content in (b"one", b"two more"):
        store.put("text", content)
        with cache.local_copy(store, "text") as path:
            assert path.read_bytes() == content
