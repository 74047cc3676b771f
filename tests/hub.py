"""A stand-in of the Hugging Face Hub on this machine: what its client asks for, served from a folder of
models/OWNER/NAME and datasets/OWNER/NAME. A program finds it through HF_ENDPOINT.

    with Hub(folder) as endpoint:
        ...
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c0ffee" * 6 + "c0de"


def entry(repo: Path, path: Path) -> dict:
    name = {"path": path.relative_to(repo).as_posix(), "oid": hashlib.sha1(str(path).encode()).hexdigest()}
    return name | ({"type": "directory", "size": 0} if path.is_dir() else {"type": "file", "size": path.stat().st_size})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str):
        self.answer({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound", X_Repo_Commit=COMMIT)

    def any_request(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        words = [unquote(word) for word in urlparse(self.path).path.strip("/").split("/")]
        api = words[0] == "api" and words.pop(0)
        kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
        repo, rest = self.server.root / kind / "/".join(words[:2]), words[2:]
        if len(words) < 2 or not repo.is_dir():
            self.missing("Repo")
        elif not api:  # OWNER/NAME/resolve/REVISION/FILE
            file = repo / "/".join(rest[2:])
            if not file.is_file():
                return self.missing("Entry")
            content, part = file.read_bytes(), self.headers.get("Range")
            about = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            if not part or self.command == "HEAD":
                return self.answer(content, **about)
            first, last = part.removeprefix("bytes=").split("-")
            piece = content[int(first) : int(last or len(content) - 1) + 1]
            self.answer(piece, 206, Content_Range=f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}", **about)
        elif rest[:1] == ["tree"]:
            folder = repo / "/".join(rest[2:])
            deep = parse_qs(urlparse(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            found = sorted(folder.rglob("*") if deep else folder.glob("*"))
            self.answer([entry(repo, path) for path in found]) if folder.is_dir() else self.missing("Entry")
        elif rest[:1] == ["paths-info"]:
            paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked).get("paths", [])
            self.answer([entry(repo, repo / path) for path in paths if (repo / path).exists()])
        else:
            files = [{"rfilename": path.relative_to(repo).as_posix()} for path in sorted(repo.rglob("*")) if path.is_file()]
            self.answer({"id": "/".join(words[:2]), "sha": COMMIT, "siblings": files, "private": False, "tags": []})

    do_GET = do_HEAD = do_POST = any_request


class Hub:
    def __init__(self, root: Path):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.root = Path(root)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_):
        self.server.shutdown(), self.server.server_close()
