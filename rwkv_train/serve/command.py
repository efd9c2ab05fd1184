"""The `serve` command: opens a model and serves it until it is stopped."""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn

from rwkv_train import program
from rwkv_train.chat.opening import data_folder
from rwkv_train.checkpoints.opener import open_for
from rwkv_train.files import quoted
from rwkv_train.generation.presets import PRESETS, stop_texts, with_given
from rwkv_train.serve.app import create_app
from rwkv_train.serve.connections import make_config
from rwkv_train.serve.guard import Guard
from rwkv_train.serve.service import Service
from rwkv_train.serve.settings import ServeConfig
from rwkv_train.serve.tokens import Tokens, check_address


@dataclass
class Opened:
    """A server that does not listen yet."""

    app: Guard
    service: Service
    config: ServeConfig


def serve(config: ServeConfig) -> int:
    """Serve a model until Ctrl-C or a signal ends it."""
    listening = _listen(config)
    opened = open_server(replace(config, port=listening.getsockname()[1]))
    server = Server(opened)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # the server ends first, and passes a signal on then
        server.run(sockets=[listening])
    waiting = sum(len(learner.journal.ledger.waiting) for learner in opened.service.learners.values())
    print(f"stopped; {waiting} corrections wait, and are learnt after the next start" if waiting else "stopped")
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Ends replies and streams of events when it is asked to stop, before it waits for whoever is connected."""

    def __init__(self, opened: Opened, **more):
        """more: as of `make_config`."""
        config = opened.config
        super().__init__(make_config(opened.app, config.host, config.port, body_bytes=config.body, **more))
        self._service, self._asked = opened.service, 0.0
        host = f"[{config.host}]" if ":" in config.host else config.host
        self._address = f"http://{host}:{config.port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"serving {', '.join(self._service.models)} at {self._address}", flush=True)
            print(f"  talk and correct at /, a live room at /room, the API at /v1; {STOP}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second Ctrl-C, if it is none of the same moment, ends it at once: a kill loses nothing that was kept."""
        if not self.should_exit:
            self._asked = time.monotonic()
            super().handle_exit(sig, frame)
        elif sig == signal.SIGINT and time.monotonic() - self._asked > 1:
            print("stopped at once; what was not finished is learnt after the next start", file=sys.stderr, flush=True)
            os._exit(130)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.end()
        if learning := self._service.teaching.now:
            print(f"finishing correction {learning[1]} of {learning[0]}", file=sys.stderr, flush=True)
        await super().shutdown(sockets)


STOP = "Ctrl-C ends it, after the correction that is being learnt"


def open_server(config: ServeConfig) -> Opened:
    """The app of the settings. Raises ValueError for what cannot be served."""
    tokens = Tokens.load(config.tokens) if config.tokens else Tokens()
    check_address(config.host, tokens)
    _check(config)
    if not config.model and not program.STARTER.exists():
        raise ValueError(f"the starter model is not there ({program.STARTER}); name a model with --model")
    name = config.model or program.STARTER
    opened = open_for(config, name)
    opened.template.prompt([{"role": "user", "content": "-"}])  # has both roles, or says so now
    service = Service(opened, config, data_folder(config.folder), name)
    return Opened(create_app(service, tokens), service, config)


def _check(config: ServeConfig) -> None:
    for name in ("reply_tokens", "most_tokens", "prompt_tokens", "lanes", "body", "rate", "state_memory", "state_disk"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(config, name)}")
    try:
        with_given(PRESETS[config.preset], config)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    stop_texts(config.stop)
    if len(set(config.profiles)) < len(config.profiles):
        raise ValueError(f"--profiles names one twice, found {', '.join(config.profiles)}")
    if config.waiting < 0 or not config.seconds > 0:
        raise ValueError(f"--waiting and --seconds must not be below 0, found {config.waiting} and {config.seconds}")
    if config.reply_tokens > config.most_tokens:
        raise ValueError(f"--reply-tokens {config.reply_tokens} is above --most-tokens {config.most_tokens}")


def _listen(config: ServeConfig) -> socket.socket:
    """A socket that listens, before anything slow is done. Raises ValueError where it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # so asyncio sends without delay
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((config.host, config.port))
        return listening
    except (OSError, OverflowError) as error:
        what = f"{quoted(config.host)}, port {config.port}, cannot be listened on ({error})"
        raise ValueError(f"{what}; name another --port or --host") from None
