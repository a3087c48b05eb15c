"""The Hugging Face hub on loopback, for the real client."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(
    files: Mapping[str, bytes], sizes: Mapping[str, int] | None = None, token: str = "good"
) -> Iterator[str]:
    """Yields the URL of a hub: "o/m" has `files`, and so has "o/gated" for clients with `token`."""
    handler = type("OneHub", (Hub,), {"files": files, "sizes": sizes or {}, "token": token})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    """Answers the part of the hub's protocol that a download uses. The repository is "o/m"."""

    files: Mapping[str, bytes]
    sizes: Mapping[str, int]
    """Sizes of files that are described but never downloaded."""
    token: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/gated" in path and self.headers.get("Authorization") != f"Bearer {self.token}":
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if self.headers.get("Authorization") == "Bearer wrong":
            return self._answer(401, b"", {"X-Error-Message": "Invalid credentials"})
        if "/broken" in path:
            return self._answer(500, b"")
        if "/o/" not in path:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.endswith(("/revision/main", "/api/models/o/m", "/api/models/o/gated")):
            siblings = [{"rfilename": name, "size": size} for name, size in self._sizes().items()]
            model = {"id": "o/m", "sha": COMMIT, "siblings": siblings}
            return self._answer(200, json.dumps(model).encode())
        if path.endswith(f"/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": size, "oid": self._oid(name)}
                for name, size in self._sizes().items()
            ]
            return self._answer(200, json.dumps(tree).encode())
        name = path.rsplit("/", 1)[-1]
        if "/resolve/" not in path or name not in self.files:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        data, headers = self.files[name], {"X-Repo-Commit": COMMIT}
        headers["ETag"] = f'"{sha(data)}"'
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(asked[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self._answer(206, data[begin:], headers)
        self._answer(200, data, headers)

    def _sizes(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.files.items()} | dict(self.sizes)

    def _oid(self, name: str) -> str:
        return sha(self.files.get(name, name.encode()))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
