"""A small imitation of the Hugging Face Hub on loopback: the requests that huggingface_hub makes.

A repository is a folder of files; `Hub.commits` gives every version of it a hash of 40 digits. What
was asked for is kept in `Hub.asked`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


@dataclass
class Hub:
    """What the server holds: content by file name, by commit, by repository."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)  # as they were made
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    cut: int = 0  # bytes after which the next answers with a large file break off
    url: str = ""

    def commit(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        """A new version of a repository; its hash."""
        content = json.dumps(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items()))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.repos.setdefault(repo, {})[sha] = dict(files)
        self.refs[repo, ref] = sha
        return sha

    def fetched(self, name: str) -> int:
        """How often a file's content was asked for."""
        return sum(m == "GET" and path.endswith(f"/{name}") for m, path, _ in self.asked)


@contextlib.contextmanager
def serving(hub: Hub):
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(hub, *args))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(False)

    def do_GET(self) -> None:
        self._get(True)

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(("POST", path, ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            told = json.loads(body)
            repo = f"{told['organization']}/{told['name']}"
            if repo in hub.repos:
                return self._json({"error": "there", "url": f"{hub.url}/{repo}"}, 409)
            hub.repos[repo], hub.private[repo] = {}, told.get("visibility") == "private"
            hub.commit(repo, {".gitattributes": b""})
            return self._json({"url": f"{hub.url}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repo = re.match(r"/api/models/([^/]+/[^/]+)/", path)[1]
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        if path.endswith("/commit/main"):
            held = dict(hub.repos[repo][hub.refs[repo, "main"]])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = hub.commit(repo, held)
            told = {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha}
            return self._json({"success": True, "hookOutput": "", **told})
        self._json({})

    def _get(self, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if path == "/api/whoami-v2":
            right = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self._json({"name": "me", "type": "user"}) if right else self._fail(401, "", "")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (asked := api or file):
            return self._fail(404, "", path)
        repo, revision = asked[1], (api[3] or "main") if api else asked[2]
        if repo not in hub.repos:
            return self._fail(404, "RepoNotFound", "Repository not found")
        if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(403, "GatedRepo", f"Access to model {repo} is restricted")
        sha = hub.refs.get((repo, revision), revision)
        if sha not in hub.repos[repo]:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        held = hub.repos[repo][sha]
        if api and api[2] == "tree":
            return self._json([
                {"type": "file", "path": name, "size": len(content),
                 "oid": hashlib.sha1(content).hexdigest()} for name, content in held.items()
            ])  # fmt: skip
        if api:
            return self._json({"id": repo, "sha": sha, "modelId": repo, "private": False,
                               "siblings": [{"rfilename": name} for name in held]})  # fmt: skip
        if file[3] not in held:
            return self._fail(404, "EntryNotFound", "Entry not found")
        self._file(sha, held[file[3]], body)

    def _file(self, sha: str, content: bytes, body: bool) -> None:
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if body and self.hub.cut and len(content) > self.hub.cut:
            self.wfile.write(content[first : first + self.hub.cut])
            self.close_connection = True
        elif body:
            self.wfile.write(content[first:])

    def _json(self, content, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
