"""A real server over a small model, in a thread of this process."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from feedback_toys import small_model

from rwkv_train import save_model
from rwkv_train.serve.command import Server, open_server
from rwkv_train.serve.service import Service
from rwkv_train.serve.settings import ServeConfig

TOKENS = {
    "viewer": "viewer-token-0123456789",
    "owner": "owner-token-0123456789",
    "stranger": "stranger-token-012345",
}
TOKEN_FILE = f"""
viewer: {{token: {TOKENS["viewer"]}, talk: true}}
owner: {{token: {TOKENS["owner"]}, talk: true, teach: true, operate: true}}
stranger: {{token: {TOKENS["stranger"]}, talk: true, teach: [another]}}
"""


class Served:
    """A server that runs. url: of its root; service: what it serves; client(name): requests with a token of TOKENS."""

    def __init__(self, url: str, service: Service):
        self.url, self.service = url, service

    def client(self, name: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKENS[name]}"} if name else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


def small_folder(path: Path, generation: str = "rwkv7") -> Path:
    """A folder with a small random model that reads bytes, to be opened by name."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "model.pth").exists():
        save_model(small_model(generation=generation), path / "model.pth")
    return path


def small_config(folder: Path, generation: str = "rwkv7", **settings) -> ServeConfig:
    """Settings for it; what it keeps lies in the same folder."""
    model = str(small_folder(folder / "small", generation) / "model.pth")
    usual = {"model": model, "tokenizer": "bytes", "folder": str(folder / "data"), "port": 0, "reply_tokens": 12}
    return ServeConfig(**usual | settings)


@contextmanager
def served(config: ServeConfig) -> Iterator[Served]:
    """A server with these settings, until the block ends."""
    opened = open_server(config)
    server = Server(opened, most=200)
    begun = threading.Event()
    original = server.startup

    async def startup(sockets=None) -> None:
        await original(sockets)
        begun.set()

    server.startup = startup
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert begun.wait(60) and server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", opened.service)
    finally:
        server.should_exit = True
        thread.join(60)


def events(response: httpx.Response) -> Iterator[tuple[str, object]]:
    """(event, data) of server-sent events; data is text where it is no JSON."""
    event = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            event = line[7:]
        if line.startswith("data: "):
            data = line[6:]
            yield event, data if data == "[DONE]" else json.loads(data)
            event = ""
