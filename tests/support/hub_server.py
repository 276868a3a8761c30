"""A hub on loopback: serves one model folder by the calls that huggingface_hub makes, and remembers them."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "somebody/tiny-vl"
COMMIT = hashlib.sha1(b"a commit").hexdigest()


class Hub:
    """`with Hub(folder) as hub`: `hub.url`, and `hub.fetched`, the names of the files whose bytes were sent."""

    def __init__(self, folder: Path, *, name: str = NAME, private: bool = False) -> None:
        self.folder = folder
        self.name = name
        self.private = private
        self.fetched: list[str] = []
        self.breaks = ""  # the file whose transfer breaks off half-way
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                return

            def do_HEAD(self) -> None:
                hub.respond(self, body=False)

            def do_GET(self) -> None:
                hub.respond(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def respond(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.tokens.add(request.headers.get("Authorization", ""))
        path = unquote(urlsplit(request.path).path)
        if self.private and request.headers.get("Authorization") != "Bearer hf_secret":
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
            self.file(request, path.rsplit("/", 1)[1], body)
        elif path.startswith((f"/api/models/{self.name}/", f"/{self.name}/")):
            self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        else:
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.etag(file)}

    def etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        file = self.folder / name
        if not file.is_file():
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            return
        if body:
            self.fetched.append(name)
        headers = {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send(request, 200, file.read_bytes(), headers, body)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], body: bool
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            half = bool(self.breaks) and request.path.endswith("/" + self.breaks)
            request.wfile.write(content[: len(content) // 2] if half else content)
            request.close_connection = request.close_connection or half
