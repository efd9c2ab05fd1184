"""Functions that a model may call: named, called and answered in the words that RWKV's G1 models have learnt.

The forms are those of samples which the models' maker publishes with them. Outside they are as in OpenAI's API: "tools"
beside a chat, "tool_calls" of the assistant, and messages of the role "tool".
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rwkv_train.files import parse_json, read_text

ASKED = "Return only a JSON function call."
FENCE = "```json"
BLOCK = re.compile(FENCE + r"\s*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def named(tools: Sequence[dict]) -> str:
    """What a system message says of functions. ValueError for what is none.

    tools: each {"type": "function", "function": {"name": ..., ...}}, or what is under "function" alone.
    """
    found = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools]
    for number, function in enumerate(found, 1):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tool {number} must be {{"type": "function", "function": {{"name": ...}}}}')
    return f"Tools:\n{_json(found)}\n{ASKED}" if found else ""


def read_tools(path: str | Path) -> list[dict]:
    """The functions that a JSON file lists. ValueError if it lists none."""
    found = parse_json(read_text(path))
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must hold a JSON array of functions, found {found!r:.60}")
    return found


def as_texts(messages: Sequence, tools: Sequence[dict] = ()) -> list:
    """A chat's messages with functions and calls as text. What has nothing of them stays as it is.

    Raises ValueError for tools and calls that are none.
    """
    written: list = []
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("tool_calls"):
            message = _with_calls(message, number)
        elif isinstance(message, dict) and message.get("role") == "tool":
            text = f"Function output:\n{_text(message, number)}"
            if written and isinstance(written[-1], dict) and written[-1].get("role") == "tool":
                text = f"{written.pop()['content']}\n{text}"
            message = {"role": "tool", "content": text}
        written.append(message)
    written = [m | {"role": "user"} if isinstance(m, dict) and m.get("role") == "tool" else m for m in written]
    if not (said := named(tools)):
        return written
    first = written[0] if written and isinstance(written[0], dict) else {}
    for role, content in (("role", "content"), ("from", "value")):
        if first.get(role) == "system" and isinstance(first.get(content), str):
            return [first | {content: f"{first[content]}\n{said}".lstrip()}, *written[1:]]
    return [{"role": "system", "content": said}, *written]


def may_call(reply: str) -> bool:
    """Whether a reply may be a call, going by its beginning."""
    begun = reply.lstrip()
    return begun.startswith(FENCE) or FENCE.startswith(begun)


def calls(reply: str) -> tuple[list[dict], str]:
    """(the calls that a reply begins with, each {"name": text, "arguments": object or text}, what follows them)"""
    found: list[dict] = []
    rest = reply.lstrip()
    while block := BLOCK.match(rest):
        try:
            call = json.loads(block[1])
        except (ValueError, RecursionError):
            break
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            break
        found.append({"name": call["name"], "arguments": call.get("arguments", {})})
        rest = rest[block.end() :].lstrip()
    return found, rest


def _with_calls(message: dict, number: int) -> dict:
    """A message with what it calls as blocks of JSON after its text."""
    try:
        asked = [call.get("function", call) for call in message["tool_calls"]]
        given = [(call["name"], call.get("arguments", {})) for call in asked]
        read = [{"name": name, "arguments": json.loads(a or "{}") if isinstance(a, str) else a} for name, a in given]
        if not all(isinstance(name, str) for name, _ in given):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = f"expected a function's name and arguments in JSON, found {message['tool_calls']!r:.80}"
        raise ValueError(f"message {number}: {what}") from None
    blocks = [f"```json\n{_json(call)}\n```" for call in read]
    before = [message["content"]] if message.get("content") else []
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": "\n".join([*before, *blocks])}


def _text(message: dict, number: int) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: its content must be text, found {content!r:.60}")
    return content


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
