"""Records to segments: which of a record's columns become text, which part of it is trained, and what is not used.

Three kinds of record: a text, a prompt with its completion, and the messages of a chat. A null column is as if it
were not there.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from rwkv_train.data import functions
from rwkv_train.data.templates import Message, Segment, Template, read_message
from rwkv_train.files import parse_json, quoted

SYSTEM = "system"  # the column beside a chat or a pair that stands before it
TOOLS = "tools"  # the column beside a chat that names the functions which its model may call

WEIGHT_0 = 'not trained: messages of "weight": 0'
WEIGHT_1 = 'not trained: messages of "weight": 1 whose role is none of --train-roles'
EARLIER = "left out: thoughts of replies that are not a chat's last one, or not trained"
EMPTY = "left out: empty thoughts; --thinking fake writes one before every last reply"
FAKE = "left out: thoughts, as --thinking fake says"
FUNCTIONS = f'read as a system message: "{TOOLS}"'
UNTRAINED = "not trained: all of a chat"
SYSTEM_FIRST = f'read as a system message: "{SYSTEM}"'
SYSTEM_IN_PROMPT = f'read as the first line of a prompt: "{SYSTEM}"'


class Rendered(NamedTuple):
    """A record as text. kind: "text", "pairs" or "messages". unused: names of the fields that the text lacks.
    remarks: what else is to be told of it, once in the summary."""

    segments: list[Segment]
    kind: str
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass
class Columns:
    """The names under which records keep their parts; several prompt columns, comma-separated, are joined
    with newlines (empty ones left out)."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"

    def __post_init__(self) -> None:
        for f in fields(self):
            if not all(name.strip() for name in getattr(self, f.name).split(",")):
                raise ValueError(f"--{f.name}-field {getattr(self, f.name)!r} holds an empty column name.")

    @property
    def prompts(self) -> list[str]:
        return [name.strip() for name in self.prompt.split(",")]

    def detect(self, record: dict) -> str | None:
        """ "messages", "pairs" or "text": the first of these whose columns the record has; None if it has none."""
        found = {name for name, value in record.items() if value is not None}
        if self.messages in found or (self.messages == "messages" and "conversations" in found):
            return "messages"
        if self.completion in found and self.prompts[0] in found:
            return "pairs"
        return "text" if self.text in found else None


def render(record: object, kind: str, template: Template, columns: Columns) -> Rendered:
    """One record of `kind` ("auto", "text", "pairs" or "messages") as text.

    Raises ValueError that says what is wrong with the record (the caller knows where it lies).
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with named columns, found {record!r:.60}")
    if kind == "auto":
        kind = columns.detect(record)
    if kind is None:
        expected = f'"{columns.text}", "{columns.prompt}" with "{columns.completion}", or "{columns.messages}"'
        flags = "--text-field, --prompt-field and --completion-field, or --messages-field"
        raise ValueError(f"no known column: expected {expected}, found {_names(record)}; name yours with {flags}")
    left = {name: value for name, value in record.items() if value is not None}
    make = {"messages": _chat, "pairs": _pair, "text": _text}[kind]
    segments, unused, remarks = make(record, left, template, columns)
    return Rendered(segments, kind, (*left, *unused), remarks)


Parts = tuple[list[Segment], tuple[str, ...], tuple[str, ...]]  # segments, unused fields in the depth, remarks


def _text(record: dict, left: dict, template: Template, columns: Columns) -> Parts:
    return [(_required(record, left, columns.text), True)], (), ()


def _pair(record: dict, left: dict, template: Template, columns: Columns) -> Parts:
    several = len(columns.prompts) > 1
    parts = [_string(record, left, name, optional=several) for name in columns.prompts]
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise ValueError(f'"{columns.prompt}" is empty')
    completion = _required(record, left, columns.completion)
    system = _system(left)
    if system:
        prompt = f"{system}\n{prompt}"
    remarks = tuple(f"no prompt column {quoted(name)}" for name in columns.prompts if record.get(name) is None)
    return [(prompt, False), (completion, True)], (), (*remarks, SYSTEM_IN_PROMPT) if system else remarks


def _chat(record: dict, left: dict, template: Template, columns: Columns) -> Parts:
    name = columns.messages
    if name == "messages" and name not in left and "conversations" in left:
        name = "conversations"
    raw = left.pop(name, None)
    if raw is None:
        raise ValueError(f"{_missing(record, name)}; name yours with --messages-field")
    if not isinstance(raw, list) or not raw:
        raise ValueError(f'"{name}" must be a list of messages, found {raw!r:.60}')
    tools, system = _tools(left), _system(left)
    raw = functions.as_texts(raw)
    messages = [read_message(message, number, template.thinks) for number, message in enumerate(raw, 1)]
    remarks = (*_weights(messages, template), *_thoughts(messages, template), *[FUNCTIONS] * bool(tools))
    unused = {f"{name}.{field}": None for message in messages for field in message.unused}
    segments, given = template.segments(raw), raw
    if system:
        own = [message.content.strip() for message in messages if template.role_of(message) == SYSTEM]
        if own and own != [system.strip()]:
            raise ValueError(f'both a "{SYSTEM}" column and a system message among "{name}"; keep one of them')
        if SYSTEM not in template.roles:
            raise ValueError(f'the "{SYSTEM}" column needs a role {SYSTEM!r} in the template')
        if not own:
            given = [{"role": SYSTEM, "content": system}, *raw]
            remarks = (*remarks, SYSTEM_FIRST)
    if tools:
        given = functions.as_texts(given, tools)
    if given is not raw:
        segments = template.segments(given)
    if not segments:
        raise ValueError(f'"{name}" holds nothing but empty messages')
    return segments, tuple(unused), remarks if any(trained for _, trained in segments) else (*remarks, UNTRAINED)


def _weights(messages: list[Message], template: Template) -> tuple[str, ...]:
    trained = [template.role_of(message) in template.train_roles for message in messages]
    found = {(message.weight, asked) for message, asked in zip(messages, trained, strict=True)}
    return (WEIGHT_0,) * ((0, True) in found) + (WEIGHT_1,) * ((1, False) in found)


def _tools(left: dict) -> list[dict]:
    """Take the functions out of what is left; [] if there are none, or the column holds something else."""
    found = left.get(TOOLS)
    try:
        found = parse_json(found) if isinstance(found, str) else found
        functions.named(found if isinstance(found, list) else [])
    except ValueError:
        return []
    return left.pop(TOOLS) and found if isinstance(found, list) else []


def _thoughts(messages: list[Message], template: Template) -> tuple[str, ...]:
    trained = [template.role_of(message) in template.train_roles for message in messages]
    last = len(messages) - 1
    gone = any(m.thought and not (n == last and trained[n]) for n, m in enumerate(messages))
    fake = template.thinking == "fake" and messages[-1].thought != "" and trained[-1]
    empty = template.thinking != "fake" and any(m.emptied for m in messages)
    return (EARLIER,) * gone + (FAKE,) * fake + (EMPTY,) * empty


def _system(left: dict) -> str:
    """Take the system column out of what is left; "" if it is not there, blank or no text."""
    if not isinstance(left.get(SYSTEM), str):
        return ""
    system = left.pop(SYSTEM)
    return system if system.strip() else ""


def _required(record: dict, left: dict, name: str) -> str:
    text = _string(record, left, name)
    if not text.strip():
        raise ValueError(f'"{name}" is empty')
    return text


def _string(record: dict, left: dict, name: str, optional: bool = False) -> str:
    """Take the text in a column out of what is left; `optional` reads a missing or null one as ""."""
    if name not in left:
        if optional:
            return ""
        raise ValueError(_missing(record, name))
    value = left.pop(name)
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be text, found {value!r:.60}')
    return value


def _missing(record: dict, name: str) -> str:
    return f'column "{name}" is null' if name in record else f'no column "{name}", found {_names(record)}'


def _names(record: dict) -> str:
    names = [quoted(name) + " (null)" * (value is None) for name, value in list(record.items())[:12]]
    return ", ".join(names) or "none"
