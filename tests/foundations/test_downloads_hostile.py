"""Downloads from servers that mix versions, never end, trickle, or say what is not so: the right
file, or one line; then the next try.
"""

import json
import time

import numpy as np
import pytest
from hostile import Hostile, answers, head
from server import Server

from vampsc import downloads
from vampsc.downloads import DownloadError, fetch, fetch_json

BODY = np.random.default_rng(0).integers(0, 256, 300_000, dtype="uint8").tobytes()
OTHER = np.random.default_rng(1).integers(0, 256, 310_000, dtype="uint8").tobytes()
ANSWERS = answers(BODY, OTHER)

# what comes of each answer: the file that is there at the end, or the message, and how many
# connections it takes at most
OUTCOMES = {
    "honest": (BODY, 2),
    "206 of another ETag": (BODY, 3),
    "206 without ETag": (BODY, 3),
    "206 of another date": (OTHER, 3),
    "206 of another start": (BODY, 3),
    "206 of another total": (BODY, 3),
    "206 with total *": (BODY, 2),
    "206 without Content-Range": (BODY, 3),
    "206 of words": (BODY, 3),
    "206 longer than its range": (BODY, 4),
    "206 in pieces of 10,000": (BODY, 16),
    "206 unasked": ("sent a part of the file where all of it was requested", 1),
    "206 always, of another ETag": ("sent a part of the file where all of it was requested", 3),
    "416 always": ("answers 416 Range Not Satisfiable", 3),
    "416 from the beginning": ("answers 416 Range Not Satisfiable", 1),
    "416 once": (BODY, 3),
    "empty file": ("sent an empty file", 1),
    "empty file without length": ("sent an empty file", 1),
    "no answer at all": ("no connection to .*Remote end closed connection without response", 4),
    "ever smaller offsets": (
        (
            "no connection to .*149996 bytes read.*has no mark of the version, so the next try"
            " starts anew"
        ),
        5,
    ),
    "one byte a connection": (
        "no connection to .*4 bytes are kept, and the next try goes on from there",
        4,
    ),
    "more than Content-Length": (BODY, 1),
    "endless": ("does not say how long the file is, and sent more than 2.0 MB", 1),
    "endless chunks": ("does not say how long the file is, and sent more than 2.0 MB", 1),
    "endless header": ("no connection to .*no answer within 0.6 seconds", 4),
    "endless redirect": ("more than 10 redirections", 11),
    "redirect in a circle": ("more than 10 redirections", 11),
    "redirect to no address": ("Invalid IPv6 URL", 1),
    "redirect to a file": ("No connection adapters were found for 'file:///etc/hostname'", 1),
    "without length": (BODY, 1),
    "chunks": (BODY, 1),
    "chunks without an end": ("no connection to .*IncompleteRead", 5),
    "half a chunk": ("no connection to .*IncompleteRead", 5),
    "slow": ("less than 1000 bytes a second came.*bytes are kept", 4),
    "slow chunks": ("less than 1000 bytes a second came", 4),
    "slow size of a chunk": ("less than 1000 bytes a second came", 4),
    "two lengths": ("Content-Length contained multiple unmatching values", 1),
    "length of words": (BODY, 1),
    "length of 5,000 digits": (BODY, 1),
    "mark with a line break": (BODY, 3),
    "no HTTP": ("no connection to .*220 smtp ready", 4),
    "a reason with control characters": (r"answers 500 \?\[31mred\?\?2J: ", 1),
}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    for name, value in (
        ("RETRY_SECONDS", 0.001),
        ("CHUNK_BYTES", 10_000),
        ("TIMEOUT_SECONDS", 0.3),
        ("MIN_BYTES_PER_SECOND", 1000),
        ("MAX_BYTES", 2_000_000),
    ):
        monkeypatch.setattr(downloads, name, value)


def test_each_answer_has_an_outcome():
    assert list(OUTCOMES) and set(OUTCOMES) == set(ANSWERS)


@pytest.mark.parametrize("name", OUTCOMES)
def test_answer(name, tmp_path):
    outcome, most = OUTCOMES[name]
    path = tmp_path / "f.bin"
    began = time.monotonic()
    with Hostile(ANSWERS[name]).running() as server:
        if isinstance(outcome, bytes):
            assert fetch(server.address, path, progress=False).read_bytes() == outcome
        else:
            with pytest.raises(DownloadError, match=outcome) as caught:
                fetch(server.address, path, progress=False)
            said = str(caught.value)
            assert (
                said.isprintable()
                and server.address in said
                and f"by hand: {path}" in said
                and not path.exists()
            )
            # the next try, from somebody who is honest
            with Server({"/f.bin": BODY}).running() as honest:
                assert fetch(f"{honest.address}/f.bin", path, progress=False).read_bytes() == BODY
        assert 1 <= len(server.asked) <= most
    assert time.monotonic() - began < 10
    assert not list(tmp_path.glob("*.part*"))


def test_what_is_right_is_gone_on_from(tmp_path):
    """After a try that ends with a line, the next one asks for the rest of the bytes that were
    right.
    """
    trouble = {"answer": ANSWERS["416 always"]}
    with Hostile(lambda number, start: trouble["answer"](number, start)).running() as server:
        with pytest.raises(DownloadError, match="416"):
            fetch(server.address, tmp_path / "f.bin", progress=False)
        assert (tmp_path / "f.bin.part").read_bytes() == BODY[:150_000]
        trouble["answer"] = lambda number, start: ANSWERS["honest"](1, start)
        server.asked.clear()
        assert fetch(server.address, tmp_path / "f.bin", progress=False).read_bytes() == BODY
        assert server.asked == [150_000]


def test_a_part_of_another_server_is_not_gone_on_from(tmp_path):
    "Two servers may call different files by the same mark."
    half = [head("200 OK", 'ETag: "1"', length=len(OTHER)) + OTHER[:100_000]]
    rest = [
        head(
            "206 Partial Content",
            'ETag: "1"',
            f"Content-Range: bytes 100000-309999/{len(OTHER)}",
            length=210_000,
        )
        + BODY[90_000:]
    ]
    first = Hostile(lambda number, start: half if number == 0 else [])
    second = Hostile(
        lambda number, start: (
            rest if start else [head("200 OK", 'ETag: "1"', length=len(BODY)) + BODY]
        )
    )
    with first.running(), second.running():
        assert (
            fetch([first.address, second.address], tmp_path / "f.bin", progress=False).read_bytes()
            == BODY
        )
        assert second.asked == [None]


def test_a_full_disk_keeps_the_old_mark_with_the_old_part(tmp_path):
    """The new version is too large for the disk: the old beginning must not pass for that of the
    new one.
    """
    old = [head("200 OK", 'ETag: "v1"', length=len(BODY)) + BODY[:100_000]]
    huge = [head("200 OK", 'ETag: "v2"', length=10**17)]
    with Hostile(lambda number, start: old if number == 0 else huge).running() as server:
        with pytest.raises(DownloadError, match="needs .* GB more"):
            fetch(server.address, tmp_path / "f.bin", progress=False)
    mark = (tmp_path / "f.bin.part.version").read_text().split("\n")[0]
    assert ((tmp_path / "f.bin.part").stat().st_size, mark) == (100_000, '"v1"')


def test_a_disk_that_an_endless_file_would_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MIN_FREE_BYTES", 10**18)
    with Hostile(ANSWERS["endless"]).running() as server:
        with pytest.raises(DownloadError, match="leaves less than .* GB free.*VAMPSC_CACHE"):
            fetch(server.address, tmp_path / "f.bin", progress=False)
    assert not list(tmp_path.glob("f.bin*"))


SECRETS = ("hunter2", "sesame", "abc123")


@pytest.mark.parametrize(
    "name",
    [
        "404",
        "no answer",
        "page",
        "cut",
        "part",
        "416",
        "empty",
        "endless",
        "redirect",
        "wrong scheme",
        "hash",
    ],
)
def test_no_secret_in_a_message_or_a_record(name, tmp_path, monkeypatch):
    "An address may hold a password or a key; nobody else needs to see them."

    def redirect(number, start):
        return [
            head(
                "302 Found",
                "Location: gopher://joe:hunter2@x.example/f?token=sesame\x1b[0m",
                length=0,
            )
        ]

    answer = {
        "404": lambda k, s: [head("404 Not Found", length=0)],
        "no answer": lambda k, s: [],
        "page": lambda k, s: [head("200 OK", "Content-Type: text/html", length=2) + b"hi"],
        "cut": lambda k, s: [head("200 OK", length=9) + b"x"],
        "part": ANSWERS["206 unasked"],
        "416": ANSWERS["416 from the beginning"],
        "empty": ANSWERS["empty file"],
        "endless": ANSWERS["endless"],
        "redirect": redirect,
    }.get(name, ANSWERS["more than Content-Length"])
    with Hostile(answer).running() as server:
        inside = server.address.removeprefix("http://")
        address = f"{'gopher' if name == 'wrong scheme' else 'http'}://joe:hunter2@{inside}?token=sesame&acc=1#abc123"
        expected = "0" * 64 if name == "hash" else None
        with pytest.raises(DownloadError) as caught:
            fetch(address, tmp_path / "f.bin", expected, progress=False)
        with pytest.raises(DownloadError) as asked:
            fetch_json(address)
        texts = [
            str(caught.value),
            str(asked.value),
            *(p.read_text(errors="replace") for p in tmp_path.glob("*.version")),
        ]
    for text in texts:
        assert not any(secret in text for secret in SECRETS) and "\x1b" not in text
    assert f"{inside.split('/')[0]}" in texts[0]


def test_the_record_has_no_secret_and_the_server_has_it(tmp_path):
    with Hostile(ANSWERS["more than Content-Length"]).running() as server:
        fetch(
            server.address.replace("//", "//joe:hunter2@") + "?token=sesame",
            tmp_path / "f.bin",
            progress=False,
        )
        assert (
            json.loads((tmp_path / "checksums.json").read_text())["f.bin"]["address"]
            == f"{server.address}?..."
        )


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda k, s: [head("200 OK", length=7) + b"[1, 2"], "no connection to .*IncompleteRead"),
        (lambda k, s: [head("200 OK", length=5) + b"[1, 2"], "something else than JSON"),
        (lambda k, s: [head("200 OK", length=1) + b"\xff"], "something else than JSON"),
        (
            lambda k, s: [head("200 OK", length=200_000) + b"[" * 200_000],
            "something else than JSON",
        ),
        (ANSWERS["endless"], "answers with more than 1.0 MB"),
        (ANSWERS["slow"], "less than 1000 bytes a second"),
        (ANSWERS["endless header"], "no answer within 0.6 seconds"),
        (ANSWERS["redirect in a circle"], "more than 10 redirections"),
        (ANSWERS["redirect to no address"], "something else than JSON|Invalid"),
    ],
    ids=["cut", "half", "bytes", "deep", "endless", "slow", "header", "circle", "nowhere"],
)
def test_an_interface_that_misbehaves(answer, words, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_ANSWER_BYTES", 1_000_000)
    with Hostile(answer).running() as server:
        with pytest.raises(DownloadError, match=words) as caught:
            fetch_json(server.address)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"f.bin": 3}',
        '{"f.bin": {}}',
        '{"f.bin": {"sha256": 1, "size": 2, "time": 3}}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_record_of_another_form(text, tmp_path):
    (tmp_path / "f.bin").write_bytes(BODY)
    (tmp_path / "checksums.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DownloadError, match="checksums.json cannot be read; delete it"):
        downloads.verify(tmp_path / "f.bin")


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "f.bin").mkdir()
    with pytest.raises(
        DownloadError, match="f.bin is a folder, where a file is to be; move it away"
    ):
        fetch("http://x.invalid/f", tmp_path / "f.bin")


def test_a_mark_that_is_damaged(tmp_path):
    (tmp_path / "f.bin.part").write_bytes(OTHER[:1000])
    (tmp_path / "f.bin.part.version").write_bytes(b"\xff\xfe\x00")
    with Server({"/f.bin": BODY}).running() as server:
        assert (
            fetch(f"{server.address}/f.bin", tmp_path / "f.bin", progress=False).read_bytes()
            == BODY
        )
        assert server.asked == [("/f.bin", None)]
