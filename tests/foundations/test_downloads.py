"Downloads against a real server that breaks off, lies, moves and replaces."

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from server import Server

from vampsc import downloads
from vampsc.downloads import DownloadError, fetch

BODY = np.random.default_rng(0).integers(0, 256, 300_000, dtype="uint8").tobytes()
OTHER = np.random.default_rng(1).integers(0, 256, 310_000, dtype="uint8").tobytes()


@pytest.fixture
def server():
    with Server({"/f.bin": BODY}).running() as server:
        yield server


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 10_000)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_once(server, tmp_path):
    path = tmp_path / "new" / "folder" / "f.bin"
    assert (
        fetch(f"{server.address}/f.bin", path, progress=False) == path and path.read_bytes() == BODY
    )
    record = json.loads((path.parent / "checksums.json").read_text())["f.bin"]
    assert (
        record["sha256"] == hashlib.sha256(BODY).hexdigest()
        and record["address"] == f"{server.address}/f.bin"
    )
    fetch(f"{server.address}/f.bin", path)
    assert len(server.asked) == 1 and leftovers(path.parent) == ["checksums.json", "f.bin"]


@pytest.mark.parametrize("cuts", [[100_000], [1, 250_000], [0, 0, 5], [299_999], [50_000] * 5])
def test_broken_connections_are_continued(cuts, server, tmp_path):
    server.cut["/f.bin"] = list(cuts)
    assert fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes() == BODY
    assert len(server.asked) == len(cuts) + 1
    got = 0
    for (_, asked), cut in zip(server.asked, [*cuts, None]):
        # only what is missing is asked for
        assert asked == (f"bytes={got}-" if got else None)
        got += min(cut or 0, len(BODY) - got)


def test_the_next_call_goes_on(server, tmp_path):
    server.cut["/f.bin"] = [120_000, 0, 0, 0, 0]
    with pytest.raises(
        DownloadError,
        match=r"no connection to 127.0.0.1.*0.1 MB are kept, and the next try goes on",
    ):
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    server.cut = {}
    server.asked = []
    assert fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes() == BODY
    assert server.asked == [("/f.bin", "bytes=120000-")]


def test_a_file_replaced_in_between_starts_anew(server, tmp_path):
    server.cut["/f.bin"] = [120_000, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    server.files["/f.bin"], server.cut = OTHER, {}
    assert (
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes() == OTHER
    )


def test_a_server_without_ranges(server, tmp_path):
    server.plain, server.cut["/f.bin"] = {"/f.bin"}, [70_000, 70_000]
    assert fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes() == BODY


def test_a_part_that_is_whole_or_too_long(server, tmp_path):
    for part in (BODY, BODY + b"more"):
        (tmp_path / "f.bin.part").write_bytes(part)
        (tmp_path / "f.bin.part.version").write_text(f'"{hashlib.sha256(BODY).hexdigest()[:16]}"')
        assert (
            fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes()
            == BODY
        )
        (tmp_path / "f.bin").unlink()


def test_the_first_address_that_gives_it(server, tmp_path):
    server.status["/gone"], server.page = 410, {"/login"}
    addresses = [f"{server.address}{p}" for p in ("/gone", "/missing", "/login", "/f.bin")]
    assert fetch(addresses, tmp_path / "f.bin", progress=False).read_bytes() == BODY
    assert [a[0] for a in server.asked] == ["/gone", "/missing", "/login", "/f.bin"]


@pytest.mark.parametrize(
    "what, words",
    [
        (404, "has no such file .moved"),
        (401, "asks for a login"),
        (403, "does not give it out"),
        (500, "answers 500"),
        ("page", "sent a web page instead"),
    ],
)
def test_refusals_name_reason_address_and_place(what, words, server, tmp_path):
    if what == "page":
        server.page = {"/f.bin"}
    else:
        server.status["/f.bin"] = what
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    assert f"{server.address}/f.bin" in str(
        caught.value
    ) and f"by hand: {tmp_path / 'f.bin'}" in str(caught.value)
    # and by hand it works
    (tmp_path / "f.bin").write_bytes(BODY)
    assert fetch(f"{server.address}/f.bin", tmp_path / "f.bin").read_bytes() == BODY


def test_no_network(server, tmp_path):
    address = f"{server.address}/f.bin"
    server.http.shutdown(), server.http.server_close()
    with pytest.raises(DownloadError, match="no connection to 127.0.0.1.*refused"):
        fetch(address, tmp_path / "f.bin", progress=False)
    with pytest.raises(DownloadError, match="no connection to nowhere.invalid"):
        fetch("http://nowhere.invalid/f", tmp_path / "f", progress=False)


def test_a_changed_file_on_the_disk(server, tmp_path):
    path = fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    path.write_bytes(OTHER)
    with pytest.raises(DownloadError, match="has changed.*Delete it"):
        fetch(f"{server.address}/f.bin", path)
    path.write_bytes(BODY)
    assert fetch(f"{server.address}/f.bin", path)


def test_a_changed_file_on_the_server(server, tmp_path):
    path = fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    path.unlink()
    server.files["/f.bin"] = OTHER
    with pytest.raises(DownloadError, match="what came has SHA-256.*as before.*checksums.json"):
        fetch(f"{server.address}/f.bin", path, progress=False)
    assert not path.exists() and leftovers(tmp_path) == ["checksums.json"]
    (tmp_path / "checksums.json").unlink()
    assert fetch(f"{server.address}/f.bin", path, progress=False).read_bytes() == OTHER


def test_an_expected_checksum(server, tmp_path):
    right = hashlib.sha256(BODY).hexdigest()
    wrong = "0" * 64
    with pytest.raises(DownloadError, match="what came has"):
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", wrong, progress=False)
    path = fetch(f"{server.address}/f.bin", tmp_path / "f.bin", right, progress=False)
    with pytest.raises(DownloadError, match="has changed.*must be 000000000000"):
        fetch(f"{server.address}/f.bin", path, wrong)


def test_a_file_larger_than_the_disk(server, tmp_path):
    server.claim["/f.bin"] = 10**16
    with pytest.raises(
        DownloadError, match=r"f.bin needs .* GB more, and .* free; make room, or.*VAMPSC_CACHE"
    ) as caught:
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(server, tmp_path):
    (tmp_path / "f.bin.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="No space left") as caught:
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "f.bin.part").unlink()
    assert fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes() == BODY


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere"
)
def test_a_folder_that_cannot_be_written(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)


def test_two_at_once(server, tmp_path, capfd):
    threads = [
        threading.Thread(
            target=fetch, args=(f"{server.address}/f.bin", tmp_path / "f.bin", None, False)
        )
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (tmp_path / "f.bin").read_bytes() == BODY and len(server.asked) == 1


def test_killed_in_the_middle(server, tmp_path):
    body = BODY * 40
    server.files["/f.bin"] = body
    server.cut["/f.bin"] = [4_000_000]
    code = (
        "import sys, time; from vampsc import downloads; downloads.RETRY_SECONDS ="
        f" 60\ndownloads.fetch({server.address + '/f.bin'!r}, {str(tmp_path / 'f.bin')!r},"
        " progress=False)"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    part = tmp_path / "f.bin.part"
    for _ in range(600):
        if part.exists() and part.stat().st_size == 4_000_000:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.asked = []
    assert fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes() == body
    assert server.asked == [("/f.bin", "bytes=4000000-")]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path))
    assert downloads.cache_folder("a", "b") == tmp_path / "a" / "b"
    monkeypatch.delenv("VAMPSC_CACHE")
    assert downloads.cache_folder().name == "vampsc"


def test_progress_is_shown(server, tmp_path, capfd):
    fetch(f"{server.address}/f.bin", tmp_path / "f.bin")
    assert "f.bin" in capfd.readouterr().err


def test_damaged_records(server, tmp_path):
    path = fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False)
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(DownloadError, match="checksums.json cannot be read; delete it"):
        fetch(f"{server.address}/f.bin", path)


def test_mirrors(server, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "VAMPSC_MIRRORS",
        f"https://other.example/=http://x/ https://far.example/data/={server.address}/",
    )
    assert (
        fetch("https://far.example/data/f.bin", tmp_path / "f.bin", progress=False).read_bytes()
        == BODY
    )
    server.files["/j"] = b'{"a": [1]}'
    assert downloads.fetch_json("https://far.example/data/j") == {"a": [1]}
    for path, words in (("f.bin", "something else than JSON"), ("none", "no such file")):
        with pytest.raises(DownloadError, match=words):
            downloads.fetch_json(f"https://far.example/data/{path}")
