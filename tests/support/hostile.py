"""A web server on loopback that answers as no server should: each answer is written to the
connection byte by byte.
"""

import contextlib
import socket
import threading
import time

END = b"\r\n\r\n"


def head(code, *lines, length=None):
    """The beginning of an answer.

    code : with its reason. lines : of the header. length : what it says of the body's.
    """
    said = [] if length is None else [f"Content-Length: {length}"]
    return (
        "\r\n".join(
            [
                f"HTTP/1.1 {code}",
                "Content-Type: application/octet-stream",
                *lines,
                *said,
                "Connection: close",
            ]
        ).encode("latin-1")
        + END
    )


def drip(block, pause):
    "The same block again and again, as long as somebody listens."
    while True:
        yield block
        time.sleep(pause)


class Hostile:
    """Called with (number of the connection, start asked for or None), `answer` gives the pieces to
    send, bytes; then the connection is closed.

    asked : the start of each request, None where all was asked for.
    """

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.ended = threading.Event()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/f.bin"

    def _one(self, connection):
        with contextlib.suppress(OSError), connection:
            text = b""
            while END not in text:
                if not (more := connection.recv(65536)):
                    return
                text += more
            wanted = [
                line
                for line in text.decode("latin-1").split("\r\n")
                if line.lower().startswith("range:")
            ]
            start = int(wanted[0].partition("=")[2].rstrip("-")) if wanted else None
            number = len(self.asked)
            self.asked.append(start)
            for piece in self.answer(number, start):
                if self.ended.is_set():
                    return
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.2)
            # else the last bytes are lost in a reset
            while connection.recv(65536):
                pass

    def _all(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    @contextlib.contextmanager
    def running(self):
        with socket.create_server(("127.0.0.1", 0)) as self.socket:
            threading.Thread(target=self._all, daemon=True).start()
            try:
                yield self
            finally:
                self.ended.set()
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_RDWR)


def answers(body, other):
    """Answers by name; `body` is right, `other` (longer) is another version.

    Returns {name: answer}. Each is a function of (number of the connection, start asked for or
    None).
    """
    tag = 'ETag: "v1"'
    n = len(body)
    half = n // 2
    # of all: the first half, then the line breaks
    first = [head("200 OK", tag, length=n) + body[:half]]

    def then(make, begin=first):
        return lambda number, start: begin if number == 0 else make(number, start)

    def part(content, start, *lines, said=None, total=None, length=None):
        said = start if said is None else said
        span = (
            "Content-Range: bytes"
            f" {said}-{said + len(content) - start - 1}/{len(content) if total is None else total}"
        )
        return [
            head(
                "206 Partial Content",
                *lines,
                span,
                length=len(content) - start if length is None else length,
            )
            + content[start:]
        ]

    def good(number, start):
        return [head("200 OK", tag, length=n) + body] if start is None else part(body, start, tag)

    def fair(number, start, bad):
        return [head("200 OK", tag, length=n) + body] if start is None else bad

    def endless(block=b"x" * 65536):
        while True:
            yield block

    def endless_chunks():
        yield head("200 OK", "Transfer-Encoding: chunked")
        yield from endless(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    def slow(*pieces):
        yield pieces[0]
        yield from drip(pieces[1], 0.05)

    return {
        "honest": then(good),
        "206 of another ETag": then(lambda k, s: fair(k, s, part(other, s or 0, 'ETag: "v2"'))),
        "206 without ETag": then(lambda k, s: fair(k, s, part(other, s or 0))),
        "206 of another date": then(
            lambda k, s: (
                [
                    head(
                        "200 OK", "Last-Modified: Tue, 02 Jan 2024 00:00:00 GMT", length=len(other)
                    )
                    + other
                ]
                if s is None
                else part(other, s, "Last-Modified: Tue, 02 Jan 2024 00:00:00 GMT")
            ),
            [
                head("200 OK", "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT", length=n)
                + body[:half]
            ],
        ),
        "206 of another start": then(lambda k, s: fair(k, s, part(body, 7, tag))),
        "206 of another total": then(lambda k, s: fair(k, s, part(body, s or 0, tag, total=n + 9))),
        "206 with total *": then(lambda k, s: fair(k, s, part(body, s or 0, tag, total="*"))),
        "206 without Content-Range": then(
            lambda k, s: fair(
                k, s, [head("206 Partial Content", tag, length=n - (s or 0)) + body[s or 0 :]]
            )
        ),
        "206 of words": then(
            lambda k, s: fair(
                k,
                s,
                [
                    head("206 Partial Content", tag, "Content-Range: the rest", length=n - (s or 0))
                    + body[s or 0 :]
                ],
            )
        ),
        "206 longer than its range": then(
            lambda k, s: fair(
                k, s, part(body + b"more", s or 0, tag, total=n, length=n + 4 - (s or 0))
            )
        ),
        "206 in pieces of 10,000": then(
            lambda k, s: fair(
                k,
                s,
                [
                    head(
                        "206 Partial Content",
                        tag,
                        f"Content-Range: bytes {s}-{s + 9999}/{n}",
                        length=10_000,
                    )
                    + body[s or 0 :][:10_000]
                ],
            )
        ),
        "206 unasked": lambda k, s: part(body, half, tag),
        "206 always, of another ETag": then(lambda k, s: part(other, s or 0, 'ETag: "v2"')),
        "416 always": then(lambda k, s: [head("416 Range Not Satisfiable", length=0)]),
        "416 from the beginning": lambda k, s: [head("416 Range Not Satisfiable", length=0)],
        "416 once": then(lambda k, s: fair(k, s, [head("416 Range Not Satisfiable", length=0)])),
        "empty file": lambda k, s: [head("200 OK", tag, length=0)],
        "empty file without length": lambda k, s: [head("200 OK", tag)],
        "no answer at all": lambda k, s: [],
        "ever smaller offsets": lambda k, s: [
            head("200 OK", length=n) + (body[: max(half - k, 0)] if k % 2 == 0 else b"")
        ],
        "one byte a connection": lambda k, s: (
            [head("200 OK", tag, length=n) + body[:1]]
            if s is None
            else [part(body, s, tag)[0][: -(n - s) + 1 or None]]
        ),
        "more than Content-Length": lambda k, s: [
            head("200 OK", tag, length=n) + body + b"more" * 1000
        ],
        "endless": lambda k, s: (p for part in ([head("200 OK", tag)], endless()) for p in part),
        "endless chunks": lambda k, s: endless_chunks(),
        "endless header": lambda k, s: slow(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        "endless redirect": lambda k, s: (
            p for part in ([head("302 Found", "Location: /f.bin")], endless()) for p in part
        ),
        "redirect in a circle": lambda k, s: [head("302 Found", "Location: /f.bin", length=0)],
        "redirect to no address": lambda k, s: [
            head("302 Found", "Location: http://[::1", length=0)
        ],
        "redirect to a file": lambda k, s: [
            head("302 Found", "Location: file:///etc/hostname", length=0)
        ],
        "without length": lambda k, s: [head("200 OK") + body],
        "chunks": lambda k, s: [
            head("200 OK", "Transfer-Encoding: chunked") + b"%x\r\n" % n + body + b"\r\n0\r\n\r\n"
        ],
        "chunks without an end": lambda k, s: [
            head("200 OK", "Transfer-Encoding: chunked") + b"%x\r\n" % n + body + b"\r\n"
        ],
        "half a chunk": lambda k, s: [
            head("200 OK", "Transfer-Encoding: chunked") + b"%x\r\n" % n + body[:half]
        ],
        "slow": lambda k, s: slow(head("200 OK", tag, length=n), b"x"),
        "slow chunks": lambda k, s: slow(
            head("200 OK", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"
        ),
        "slow size of a chunk": lambda k, s: slow(
            head("200 OK", "Transfer-Encoding: chunked"), b"0"
        ),
        "two lengths": lambda k, s: [head("200 OK", tag, "Content-Length: 5", length=n) + body],
        "length of words": lambda k, s: [head("200 OK", tag, length="\xb2") + body],
        "length of 5,000 digits": lambda k, s: [head("200 OK", tag, length="9" * 5000) + body],
        "mark with a line break": then(
            good, [head("200 OK", 'ETag: "v\r\n 1"', length=n) + body[:half]]
        ),
        "no HTTP": lambda k, s: [b"220 smtp ready\r\n"],
        "a reason with control characters": lambda k, s: [
            head("500 \x1b[31mred\x07\x9b2J", length=0)
        ],
    }
