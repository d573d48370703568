"A web server on loopback that can do all that servers do to a download."

import contextlib
import hashlib
import http.server
import threading
import urllib.parse


class Server:
    """Files by path, {"/a/b.txt": bytes}; what goes wrong is set by path, too.

    cut : lists of bytes after which the next connections break. status : codes instead of a file.
        page : paths that give a web
    page. claim : sizes stated instead of the true ones. plain : paths served without Range and
        without a mark of the version.
    asked : (path, Range or None) of each request.
    """

    def __init__(self, files=None):
        self.files = dict(files or {})
        self.cut = {}
        self.status = {}
        self.page = set()
        self.claim = {}
        self.plain = set()
        self.asked = []
        self.redirect = {}

    @property
    def address(self):
        return f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request):
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        whole = urllib.parse.unquote(request.path)
        path = whole if whole in self.files else path
        self.asked.append((path, request.headers.get("Range")))
        if path in self.redirect:
            return self.send(request, 302, b"", {"Location": self.redirect[path]})
        code = self.status.get(
            path, 404 if path not in self.files and path not in self.page else 200
        )
        if code != 200:
            return self.send(request, code, b"no")
        if path in self.page:
            return self.send(
                request, 200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"}
            )
        body = self.files[path]
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        marks = {} if path in self.plain else {"ETag": tag, "Accept-Ranges": "bytes"}
        wanted = request.headers.get("Range")
        version = request.headers.get("If-Range", tag)
        if not wanted or path in self.plain or version != tag:
            return self.send(request, 200, body, marks, path)
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(body):
            return self.send(request, 416, b"", marks)
        self.send(
            request,
            206,
            body[start:],
            {**marks, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"},
            path,
        )

    def send(self, request, code, body, headers=None, path=None):
        request.send_response(code)
        for name, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(self.claim.get(path, len(body))))
        request.end_headers()
        stop = self.cut[path].pop(0) if self.cut.get(path) else None
        request.wfile.write(body[:stop])
        if stop is not None or path in self.claim:
            request.close_connection = True

    @contextlib.contextmanager
    def running(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(this):
                self.answer(this)

            def log_message(this, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()
