"""What a request must pass before the app sees it: host, origin, rate, and a body that is small, quick and sound."""

import asyncio
import ipaddress
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_train.files import quoted
from rwkv_train.serve.errors import ERRORS, ApiError, ErrorAnswer, install_errors
from rwkv_train.serve.tokens import Rights, Tokens, check_address, is_loopback, require

__all__ = [
    "ERRORS",
    "ApiError",
    "ErrorAnswer",
    "Guard",
    "Rate",
    "Rights",
    "Tokens",
    "check_address",
    "check_json",
    "install_errors",
    "require",
]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SAFE = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
DEEPEST = 64  # brackets within brackets of a body
DRAINED = 8  # times the limit: what is read of a body too large, so that its sender is still there for the answer
ANY = ("0.0.0.0", "::")


class Rate:
    """How many requests a name may make a minute, evenly or at once. Remembers a fixed number of names, those that
    came last.

    per_minute: of each name, at least 1. clock: seconds, going on. names: how many are remembered.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic, names: int = 4096):
        if per_minute < 1:
            raise ValueError(f"the rate must be at least 1 request a minute, found {per_minute}")
        self.per_minute, self.clock, self.names = per_minute, clock, names
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, at which time

    def take(self, name: str) -> int:
        """Count a request: 0, or the whole seconds after which there is room for it again."""
        now, second = self.clock(), self.per_minute / 60
        left, then = self._left.pop(name, (float(self.per_minute), now))
        left = min(left + (now - then) * second, self.per_minute)
        wait = 0 if left >= 1 else max(1, math.ceil((1 - left) / second))
        self._left[name] = (left if wait else left - 1, now)
        if len(self._left) > self.names:
            self._left.popitem(last=False)
        return wait


class Guard:
    """ASGI middleware around the whole app, its error pages as well.

    Args:
        tokens: who is counted under a name; the others under their address
        host: the address that is served
        allow: further names that the server goes by, as a reverse proxy's
        body_bytes: of a request's body, at most
        body_seconds: in which a body must be here
        bodies_bytes: of the bodies of all requests in progress, at most
        rate: requests a minute, None for no limit
        clock: seconds, for the rate
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens,
        host: str = "127.0.0.1",
        allow: Iterable[str] = (),
        body_bytes: int = 1 << 20,
        body_seconds: float = 30,
        bodies_bytes: int = 256 << 20,
        rate: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.app, self.tokens = app, tokens
        self.any_address = host in ANY
        self.hosts = {_plain(name) for name in (host, *allow)}
        self.body_bytes, self.body_seconds, self.bodies_bytes = body_bytes, body_seconds, bodies_bytes
        self.rate = None if rate is None else Rate(rate, clock)
        self._held = 0  # bytes of the bodies of requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, body = Headers(scope=scope), bytearray()
        send = _with_headers(scope, send)
        try:
            try:
                self._check_host(headers)
                self._check_rate(scope, headers)
                if scope["type"] == "http":
                    if not await self._read(receive, headers, body):
                        return
                    receive = _again(bytes(body), receive)
            except ApiError as refused:
                if headers.get("transfer-encoding") or headers.get("content-length", "0") != "0":
                    refused.headers["Connection"] = "close"  # the rest of a body is not waited for
                await refused.answer()(scope, receive, send)
                return
            await self.app(scope, receive, send)
        finally:
            self._held -= len(body)

    def _check_host(self, headers: Headers) -> None:
        """Against pages of others: a name of theirs may lead to this server (DNS rebinding), and a request of theirs
        names them as its origin."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host, port = _address(f"//{hosts[0]}") if len(hosts) == 1 else (None, None)
        if host is None:
            raise ApiError(400, "the header Host must name this server, once")
        if not self._serves(host):
            raise ApiError(400, f"this server does not go by {quoted(host)}; start it with --allow-host {quoted(host)}")
        if origins:
            usual = {"http": 80, "https": 443}.get(origins[0].partition(":")[0], 0)
            other, other_port = _address(origins[0])
            if len(origins) > 1 or not usual or (other, other_port or usual) != (host, port or usual):
                raise ApiError(403, f"pages of {quoted(origins[0])} may not use this server", "origin_not_allowed")

    def _serves(self, host: str) -> bool:
        if host in self.hosts or is_loopback(host):
            return True
        return self.any_address and _is_ip(host)  # no name, so nobody else's

    def _check_rate(self, scope: Scope, headers: Headers) -> None:
        try:
            rights = self.tokens.of(headers.get("authorization"))
        except ApiError as error:
            rights, unknown = None, error
        if self.rate:
            wait = self.rate.take(f"token {rights.name}" if rights and len(self.tokens) else _neighbourhood(scope))
            if wait:
                told = f"more than {self.rate.per_minute} requests a minute; try again in {wait} s"
                raise ApiError(429, told, headers={"Retry-After": str(wait)})
        if not rights and scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            raise ApiError(401, unknown.message, headers=unknown.headers)  # before its body takes room

    async def _read(self, receive: Receive, headers: Headers, body: bytearray) -> bool:
        """Fill in the body; False if the client has gone."""
        declared, size, more = headers.get("content-length", "0"), 0, True
        most = self.body_bytes
        too_large = ApiError(413, f"the body has more than {most:,} bytes; send less", "request_too_large")
        if not declared.isdigit() or int(declared[:20]) > (most if "expect" in headers else DRAINED * most):
            raise too_large
        try:
            async with asyncio.timeout(self.body_seconds):
                while more and size <= DRAINED * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    size += len(piece)
                    if size <= most:
                        self._hold(piece, body)
        except TimeoutError:
            raise ApiError(408, f"the body was not here after {self.body_seconds:g} s; send it faster") from None
        if size > most:
            raise too_large
        if body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
                raise ApiError(400, "the body must be JSON, with the header Content-Type: application/json")
            check_json(bytes(body))
        return True

    def _hold(self, piece: bytes, body: bytearray) -> None:
        if self._held + len(piece) > self.bodies_bytes:
            raise ApiError(503, "too much is being sent at once; try again", headers={"Retry-After": "1"})
        self._held += len(piece)
        body += piece


def check_json(body: bytes) -> None:
    """ApiError 400 for a body that is no JSON, or one that no answer could repeat: UTF-8 alone, numbers that are
    finite and not thousands of digits long, no half surrogate pairs, brackets DEEPEST deep at most."""
    try:
        text = body.decode("utf-8-sig")
        _check_depth(text)
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a surrogate pair (\\ud800 to \\udfff); send whole characters") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is no JSON: {error.msg} ({where})", "json_invalid") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {DEEPEST} deep") from None
    except ValueError:  # Python's words name a function to call
        raise ApiError(400, "a whole number in the body has thousands of digits; send a smaller one") from None


def _check_depth(text: str) -> None:
    """RecursionError for brackets deeper than DEEPEST; takes off the innermost ones, as often."""
    bare = re.sub(r'"(?:[^"\\]++|\\.)*+"?', "", text, flags=re.DOTALL)  # strings; in one go, whatever is in them
    brackets = re.sub(r"[^][}{]+", "", bare).translate({ord("{"): "[", ord("}"): "]"})
    for _ in range(DEEPEST):
        brackets = brackets.replace("[]", "")
        if not brackets:
            return
    if "[]" in brackets or len(brackets) > DEEPEST:
        raise RecursionError


def _no_number(name: str) -> object:
    raise ApiError(400, f"{quoted(name)} in the body is no number; use null, or leave the field out", "json_invalid")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _again(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body, and then what comes after it."""
    waiting = [body]

    async def receiving() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receiving


def _with_headers(scope: Scope, send: Send) -> Send:
    """A send that puts the headers of safety on every answer, and lets no page of others in (CORS)."""
    safe = dict(SAFE)
    if scope["path"].startswith("/v1/"):
        safe[b"cache-control"] = b"no-store"

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message.get("headers", ())]
            kept = [(n, v) for n, v in headers if n not in safe and not n.startswith(b"access-control-")]
            message = {**message, "headers": kept + list(safe.items())}
        await send(message)

    return sending


def _address(url: str) -> tuple[str | None, int | None]:
    """(host, port) of an origin, or of a Host header behind "//"; None for a host that is none."""
    try:
        parts = urlsplit(url)
        if parts.path or parts.query or parts.fragment or "@" in parts.netloc or not parts.hostname:
            return None, None
        return _plain(parts.hostname), parts.port
    except ValueError:
        return None, None


def _plain(host: str) -> str:
    return host.lower().strip("[]").removesuffix(".")


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _neighbourhood(scope: Scope) -> str:
    """The client's address; of IPv6 the 64 bits that one household has."""
    address = (scope.get("client") or ("",))[0]
    if ":" not in address or not _is_ip(address):
        return f"address {address}"
    return f"address {int(ipaddress.IPv6Address(address.partition('%')[0])) >> 64:x}"
