"""Settings of `serve`. Without torch, so that help comes at once."""

from dataclasses import dataclass, field
from typing import Literal

from rwkv_train.command_config import OpenedConfig, SamplingConfig

LOOPBACK, PORT = "127.0.0.1", 8080


@dataclass
class ServeConfig(OpenedConfig, SamplingConfig):
    """Serve a model: an OpenAI-like API, corrections while it talks, and a page to talk and correct on."""

    model: str | None = None
    """checkpoint, runs/NAME, hf:OWNER/REPO/FILE, or a folder with model.pth; the small one that comes along if
    not given"""

    host: str = LOOPBACK
    """address to listen on; other than this machine's own it needs tokens"""

    port: int = PORT
    """port to listen on; 0 takes a free one"""

    tokens: str | None = None
    """YAML file of who may do what: NAME: {token: ..., talk: true, teach: true or [PROFILE, ...], operate: true}"""

    allow_host: list[str] = field(default_factory=list)
    """other names by which browsers reach this server, as behind a proxy"""

    profiles: list[str] = field(default_factory=list)
    """profiles of corrections to serve, each a model of its own in the API; one of the model's name if not given"""

    reply_tokens: int = 500
    """tokens of a reply that does not ask for a number of them"""

    most_tokens: int = 4096
    """tokens of a reply that one can ask for, at most"""

    prompt_tokens: int = 32768
    """tokens of a prompt at most, with all that has to be read again before it"""

    lanes: int = 64
    """replies written side by side; more of them wait"""

    waiting: int = 256
    """replies that wait, at most"""

    seconds: float = 600.0
    """a reply that takes longer is broken off"""

    body: int = 1_000_000
    """bytes of a request, at most"""

    rate: int | None = None
    """requests a minute of one token, or of one address where there are no tokens; if not given, 600 of a token, and
    any number where there are none"""

    state_memory: int = 512
    """MB of conversations' states in memory"""

    state_disk: int = 4096
    """MB of conversations' states on the disk"""

    room: bool = False
    """also read lines "user: text" of a live chat from standard input, for the room at /room, and print its answers"""

    prefix: str = ""
    """room: only messages that begin with it are taken"""

    pick: Literal["fifo", "random", "newest"] = "fifo"
    """room: which of the waiting messages is answered next"""

    queue: int = 50
    """room: messages that wait at most"""

    per_user: int = 3
    """room: messages of one user that wait at most"""

    room_rate: int = 10
    """room: messages of one user that are taken in a minute at most"""
