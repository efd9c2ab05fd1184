"""Who may talk, teach and operate: a file of tokens, or everybody on this machine alone. No token gets into a log."""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rwkv_train.files import quoted, read_yaml
from rwkv_train.serve.errors import ApiError

SHORTEST = 16  # characters of a token; 16 of 64 different ones cannot be guessed
EXAMPLE = 'owner: {token: "...", talk: true, teach: true, operate: true}'
BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="token",
    description="A token out of the server's file of tokens. A server without one asks for none.",
)
Right = Literal["talk", "teach", "operate"]


@dataclass(frozen=True)
class Rights:
    """What a token allows. name: whose sessions are seen. teach: all profiles, none, or those of these names."""

    name: str
    talk: bool = False
    teach: bool | frozenset[str] = False
    operate: bool = False

    def may_teach(self, profile: str) -> bool:
        return self.teach if isinstance(self.teach, bool) else profile in self.teach


LOCAL = Rights("local", True, True, True)


class Tokens:
    """Tokens and their rights; none: everybody may do everything, as `local`. Keeps digests, so that no dump of it
    shows a token and all comparisons take the same time.

    tokens: rights by token.
    """

    def __init__(self, tokens: dict[str, Rights] | None = None):
        self._rights = [(_digest(token), rights) for token, rights in (tokens or {}).items()]

    def __len__(self) -> int:
        return len(self._rights)

    @property
    def operators(self) -> list[str]:
        """Names of those who may operate."""
        return [rights.name for _, rights in self._rights if rights.operate]

    def __repr__(self) -> str:
        return f"Tokens({', '.join(rights.name for _, rights in self._rights)})"

    @classmethod
    def load(cls, path: str | Path) -> "Tokens":
        """Tokens out of a YAML file, {name: {token, talk, teach, operate}}; ValueError, with file and name, for
        whatever is wrong in it."""
        try:
            found = read_yaml(path)
            mode = Path(path).expanduser().stat().st_mode
        except OSError as error:
            raise ValueError(f"{path}: the file of tokens cannot be read ({error.strerror}); name another") from None
        if not isinstance(found, dict) or not found:
            raise ValueError(f"{path}: there are no tokens in it; write a line as {EXAMPLE}")
        tokens: dict[str, Rights] = {}
        for name, entry in found.items():
            token, rights = _entry(f"{path}: {quoted(str(name))}", name, entry)
            if token in tokens:
                others = quoted(tokens[token].name)
                raise ValueError(f"{path}: {quoted(name)} has the token of {others}; give each its own")
            tokens[token] = rights
        if os.name == "posix" and mode & 0o044:
            print(f"{path}: others on this machine can read the tokens; chmod 600 {path}", file=sys.stderr)
        return cls(tokens)

    def of(self, header: str | None) -> Rights:
        """The rights of a request by its header `Authorization`. ApiError 401 if it names no known token."""
        scheme, _, token = (header or "").strip().partition(" ")
        return self.of_token(token.strip() if scheme.lower() == "bearer" else None)

    def of_token(self, token: str | None) -> Rights:
        """The rights of a token, as a WebSocket's first message has it. ApiError 401 if it is not known."""
        if not self._rights:
            return LOCAL
        digest = _digest(token if isinstance(token, str) else "")
        same = [rights for known, rights in self._rights if hmac.compare_digest(known, digest)]  # compares with all
        if not same:
            what = "this token is not known here" if token else "a token is needed"
            raise ApiError(
                401, f"{what}; send the header Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"}
            )
        return same[0]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _entry(where: str, name: object, entry: object) -> tuple[str, Rights]:
    """(token, rights) of an entry. ValueErrors never show a token."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
        raise ValueError(f"{where} is no name; use up to 64 letters, digits and . _ -")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must have a token and rights; write {EXAMPLE}")
    unknown = [quoted(str(key)) for key in entry if key not in ("token", "talk", "teach", "operate")]
    if unknown:
        raise ValueError(f"{where} has the key {unknown[0]}; known are token, talk, teach and operate")
    token, teach = entry.get("token"), entry.get("teach", False)
    if not isinstance(token, str):
        raise ValueError(f"{where} has no token; write one, in quotes")
    if len(token) < SHORTEST or not re.fullmatch(r"[!-~]+", token):
        raise ValueError(f"{where}: a token has at least {SHORTEST} letters, digits and signs of ASCII and no spaces")
    for right in ("talk", "operate"):
        if not isinstance(entry.get(right, False), bool):
            raise ValueError(f"{where}: {right} must be true or false")
    if isinstance(teach, list) and all(isinstance(profile, str) for profile in teach):
        teach = frozenset(teach)
    if not isinstance(teach, bool | frozenset):
        raise ValueError(f"{where}: teach must be true (all profiles), false, or a list of profiles' names")
    rights = Rights(name, entry.get("talk", False), teach, entry.get("operate", False))
    if not (rights.talk or rights.teach or rights.operate):
        raise ValueError(f"{where} may do nothing; give it talk, teach or operate, or take it out")
    return token, rights


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_address(host: str, tokens: Tokens) -> None:
    """ValueError for an address that others reach, where there are no tokens."""
    if not is_loopback(host) and not len(tokens):
        raise ValueError(
            f"others may reach {quoted(host)}, so tokens are needed; name a file of them with --tokens, with lines as "
            f"{EXAMPLE}, or leave out --host to serve this machine alone"
        )


def require(right: Right) -> Callable[..., Awaitable[Rights]]:
    """A FastAPI dependency: the rights of whoever asks, out of the Tokens in `app.state.tokens`. ApiError 401, or 403
    without that right. Of `teach` it asks for some profile; which one is for `may_teach`."""

    async def rights_of(
        request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
    ) -> Rights:
        rights = request.app.state.tokens.of(request.headers.get("authorization"))
        if not getattr(rights, right):
            raise ApiError(403, f"{quoted(rights.name)} may not {right}; use a token that may", "not_allowed")
        return rights

    return rights_of


class PathsAlone(logging.Filter):
    """Takes queries out of what is logged: they are what people wrote, maybe even a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(a.partition("?")[0] if isinstance(a, str) else a for a in record.args)
        return True


def log_without_tokens(config: dict, loggers: dict) -> dict:
    """A configuration of logging with further loggers, in which all handlers leave out queries."""
    handlers = {name: handler | {"filters": ["paths"]} for name, handler in config["handlers"].items()}
    filters = {"paths": {"()": PathsAlone}}
    return config | {"handlers": handlers, "filters": filters, "loggers": config["loggers"] | loggers}
