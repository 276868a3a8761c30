"""A hub on loopback: serves one model folder by the calls that huggingface_hub makes, whole or in ranges, and counts.

It reads no file as a whole, so that sparse files of any size can be served. What may go wrong is switched on by the
attributes of `Hub`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import pytest

NAME = "somebody/tiny-vl"
COMMIT = hashlib.sha1(b"a commit").hexdigest()
HASHED_BYTES = 64 << 20  # of a larger file the ETag is made of name, size and time
CHUNK_BYTES = 1 << 20

Wrong = Literal[
    "",
    "ignores ranges",  # 200, and the whole file
    "refuses ranges",  # 416
    "forbids ranges",  # 403
    "knows no ranges",  # 501
    "says none",  # Accept-Ranges: none
    "shifted",  # another range than asked for, as it says
    "says nothing",  # 206 without Content-Range
    "longer",  # more bytes than the range that it says
    "shorter",  # fewer
    "compressed",  # says that the bytes are compressed
    "no etag",
    "another commit",  # than that which it was asked for, as it says
]


@dataclass
class Asked:
    """One GET of a file: its name, and the range asked for, if one was."""

    name: str
    range: str | None


class Hub:
    """`with Hub(folder) as hub`: `hub.url`, and what was asked for and sent.

    Attributes:
        asked: Every GET of a file.
        sent: Bytes of bodies by file name; those of the API's answers under "api".
        tokens: What was sent to the hub as Authorization; `other_tokens` what was sent to the other host.
        wrong: What is wrong with the answers to requests for ranges.
        claims: How long files are, as the answers to requests for ranges say; 0 is as they are.
        breaks: A file of which never more than the first half is sent.
        breaks_at: The first byte of a file that is never sent; the connection ends there.
        breaks_after: How many bytes of a file one answer has; the connection ends there.
        holds_at: As breaks_at, but the connection stays open, until `go` is set; `held` is set meanwhile.
        etags: Of a file, in one answer after another, the last for ever.
    """

    def __init__(
        self, folder: Path, *, name: str = NAME, private: bool = False, redirects: Literal["", "host", "path"] = ""
    ) -> None:
        self.folder = folder
        self.name = name
        self.private = private
        self.redirects = redirects
        self.asked: list[Asked] = []
        self.sent: Counter[str] = Counter()
        self.tokens: set[str] = set()
        self.other_tokens: set[str] = set()
        self.wrong: Wrong = ""
        self.claims = 0
        self.breaks = ""
        self.breaks_at: dict[str, int] = {}
        self.breaks_after: dict[str, int] = {}
        self.holds_at: dict[str, int] = {}
        self.held, self.go = threading.Event(), threading.Event()
        self.etags: dict[str, list[str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                return

            def do_HEAD(self) -> None:
                hub.respond(self, body=False)

            def do_GET(self) -> None:
                hub.respond(self, body=True)

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client has what it wanted
                    super().handle()

        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2 if redirects == "host" else 1)]
        self.url, *others = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)
        self.files_url = {"": "", "path": "", "host": (others or [""])[0]}[redirects]

    @property
    def fetched(self) -> list[str]:
        """The names of the files that were asked for."""
        return [asked.name for asked in self.asked]

    def forget(self) -> None:
        """Count anew."""
        self.asked.clear()
        self.sent.clear()

    def __enter__(self) -> Hub:
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def respond(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        token = request.headers.get("Authorization", "")
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/files/"):
            self.other_tokens.add(token)
            self.file(request, path.rsplit("/", 1)[1], body)
            return
        self.tokens.add(token)
        if self.private and token != "Bearer hf_secret":
            self.send(request, 401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif path in {f"/api/models/{self.name}", *(f"/api/models/{self.name}/revision/{r}" for r in ("main", COMMIT))}:
            siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            info = {"_id": "1", "id": self.name, "modelId": self.name, "sha": COMMIT, "private": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
            self.send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith(f"/api/models/{self.name}/tree/"):
            tree = [self.entry(file) for file in sorted(self.folder.iterdir())]
            self.send(request, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif any(path.startswith(f"/{self.name}/resolve/{r}/") for r in ("main", COMMIT)):
            self.resolve(request, path.rsplit("/", 1)[1], body)
        elif path.startswith((f"/api/models/{self.name}/", f"/{self.name}/")):
            self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        else:
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag_of(file)}

    def etag(self, file: Path) -> str:
        etags = self.etags.get(file.name) or [etag_of(file)]
        return etags.pop(0) if len(etags) > 1 else etags[0]

    def resolve(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        """Send a file, or where it lies: large ones are sent by another host, or from another path of this one."""
        file = self.folder / name
        if not file.is_file():
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        elif self.redirects and file.suffix == ".safetensors":
            headers = {"Location": f"{self.files_url}/files/{name}", "X-Repo-Commit": COMMIT}
            if self.redirects == "host":
                headers |= {"X-Linked-Etag": f'"{self.etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            self.send(request, 302 if self.redirects == "host" else 307, b"", headers, body)
        else:
            self.file(request, name, body)

    def file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        file = self.folder / name
        total = file.stat().st_size
        asked = request.headers.get("Range")
        if body:
            self.asked.append(Asked(name, asked))
        headers = {"Accept-Ranges": "none" if self.wrong == "says none" else "bytes"}
        if self.redirects == "host" and request.path.startswith("/files/"):
            headers["ETag"] = '"of the other host"'
        else:
            headers |= {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if found is None or not body or self.wrong == "ignores ranges":
            self.send_part(request, file, 200, 0, total, headers, body)
            return
        start, end = int(found[1]), min(int(found[2] or total) + 1, total)
        refusal = {"refuses ranges": 416, "forbids ranges": 403, "knows no ranges": 501}.get(self.wrong)
        if start >= end or refusal:
            self.send(request, refusal or 416, b"", headers | {"Content-Range": f"bytes */{total}"}, body)
            return
        if self.wrong == "shifted":
            start, end = start + 1, min(end + 1, total)
        if self.wrong != "says nothing":
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{self.claims or total}"
        if self.wrong == "compressed":
            headers["Content-Encoding"] = "gzip"
        if self.wrong == "another commit":
            headers["X-Repo-Commit"] = "0" * 40
        if self.wrong == "no etag":
            del headers["ETag"]
        end += {"longer": 1, "shorter": -1}.get(self.wrong, 0)
        self.send_part(request, file, 206, start, end, headers, body)

    def send_part(
        self,
        request: BaseHTTPRequestHandler,
        file: Path,
        status: int,
        start: int,
        end: int,
        headers: dict[str, str],
        body: bool,
    ) -> None:
        """Send a part of a file, piece by piece; or less of it, where the connection is to break off or to hold."""
        self.begin(request, status, end - start, headers)
        last = end
        if file.name == self.breaks:
            last = file.stat().st_size // 2
        last = min(
            last, self.breaks_at.get(file.name, last), self.holds_at.get(file.name, last),
            start + self.breaks_after.get(file.name, end),
        )  # fmt: skip
        for piece in pieces(file, start, last) if body else ():
            self.sent[file.name] += len(piece)  # before the client has it and a test looks
            request.wfile.write(piece)
        if not body or last == end:
            return
        request.close_connection = True
        if file.name in self.holds_at:
            request.wfile.flush()
            self.held.set()
            self.go.wait(60)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], body: bool
    ) -> None:
        self.begin(request, status, len(content), headers)
        if body:
            request.wfile.write(content)
            self.sent["api"] += len(content)

    def begin(self, request: BaseHTTPRequestHandler, status: int, length: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(length))
        request.end_headers()


def etag_of(file: Path) -> str:
    status = file.stat()
    about = f"{file.name} {status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.sha1(file.read_bytes() if status.st_size <= HASHED_BYTES else about).hexdigest()


def pieces(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        for at in count(start, CHUNK_BYTES):
            if at >= end:
                return
            yield stream.read(min(CHUNK_BYTES, end - at))


def point_at(patch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """Set in this process what a hub's client reads from its environment when it is imported; caches lie in `home`."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    patch.setenv("QVSPLIT_CACHE", str(home / "qvsplit"))
