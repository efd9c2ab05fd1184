"""A small stand-in for the Hugging Face hub, with the few requests that huggingface_hub makes to find and fetch files.

python hub_stand_in.py OWNER/REPO FOLDER [PORT]: serves a folder's files as a repository; HF_ENDPOINT is its address.
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_stand_in"


class StandIn:
    """Repositories, and the requests that were made. cut: downloads break off after half of what is left."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> content
        self.refs: dict[tuple[str, str], str] = {}  # (repository, branch) -> commit
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.cut = False
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files into a repository, on a branch, in place of those that were there."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.refs[repo, branch] = commit
        return commit

    def fetched(self, what: str) -> list[dict[str, str]]:
        """The headers of the requests for a file's content."""
        return [headers for method, path, headers in self.requests if method == "GET" and path.endswith(what)]

    def answer(self, method: str, path: str, headers: dict) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content)."""
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(revision|resolve|tree)/([^/]+)(?:/(.*))?)?", path)
        repo, what, revision, file = match.groups() if match else ("", "", "", "")
        welcome = headers.get("authorization") == f"Bearer {TOKEN}"
        if repo not in self.repos or (repo in self.private and not welcome):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revision = unquote(revision or "main")
        commit = self.refs.get((repo, revision), revision)
        if commit not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[repo][commit]
        if what == "tree":
            found = [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        if what != "resolve":
            found = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        if repo in self.gated and not welcome:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if unquote(file) not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return self._content(files[unquote(file)], commit, headers)

    def _content(self, content: bytes, commit: str, headers: dict) -> tuple[int, dict[str, str], bytes]:
        about = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if not asked:
            return 200, about, content
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        return 206, about | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def listening(stand_in: StandIn, port: int = 0) -> Iterator[StandIn]:
    """The stand-in at an address of this machine, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self):
            headers = {name.lower(): value for name, value in self.headers.items()}
            path = urlsplit(self.path).path
            stand_in.requests.append((self.command, path, headers))
            status, about, content = stand_in.answer(self.command, path, headers)
            self.send_response(status)
            for name, value in (about | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.close_connection = cut = stand_in.cut and "ETag" in about
            self.wfile.write(content[: len(content) // 2] if cut else content)

        do_GET = do_HEAD = reply

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()


def use(patch: pytest.MonkeyPatch, stand_in: StandIn, folder: Path) -> None:
    """Have this process take the stand-in for the hub, and a folder for the cache; nothing is known of either yet."""
    import huggingface_hub.file_download

    from rwkv_train.checkpoints import hub

    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", stand_in.url)
    template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.delenv("HF_TOKEN", raising=False)
    hub._chosen.cache_clear()


def main(repo: str, folder: str, port: str = "0") -> None:
    stand_in = StandIn()
    files = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    stand_in.commit(repo, files)
    with listening(stand_in, int(port)):
        print(f"HF_ENDPOINT={stand_in.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
