"""How the messages of a chat become text, and which parts of it are trained.

A segment is (text, trained). Those of released models are in known_templates.py.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from rwkv_train.files import read_yaml

Segment = tuple[str, bool]
SHAREGPT = {"human": "user", "gpt": "assistant"}  # the role names of {"from": ..., "value": ...} messages
WORLD_CHAT = {
    "system": "System: {content}\n\n",
    "user": "User: {content}\n\n",
    "assistant": "Assistant: {content}\n\n",
}
NEW = {"paragraphs": False, "thinks": False, "thinking": "off"}  # what templates have not always said, as it was
THINK, THOUGHT = "<think>", "</think>"  # before and after a thought
REASONING = "reasoning_content"  # where a message has its thought apart from its content, as in other programs' APIs


class ThoughtRequest(NamedTuple):
    """A way to ask for a thought. suffix: after a user's text; opening: of the reply, written for the model."""

    suffix: str
    opening: str


THINKING = {
    "off": ThoughtRequest("", ""),
    "fake": ThoughtRequest("", " <think>\n</think"),  # an empty thought
    "on": ThoughtRequest("", " <think"),
    "normal": ThoughtRequest(" (think)", " <think"),
    "short": ThoughtRequest(" (think a bit)", " <think"),
    "long": ThoughtRequest(" (think a lot)", " <think"),
}


class TurnEnd(NamedTuple):
    """What ends a message: a text, where one of some others follows it; where there are none, the text alone."""

    text: str
    before: tuple[str, ...] = ()

    @property
    def marks(self) -> list[str]:
        """The texts that tell the end."""
        return [self.text + name for name in self.before] or [self.text] * bool(self.text)

    def find(self, text: str) -> int:
        """Where in a text the end begins; -1 if it has none."""
        return min((at for mark in self.marks if (at := text.find(mark)) >= 0), default=-1)


@dataclass
class Template:
    """How chat messages are written; the default is the format RWKV's World models are trained on.

    roles: a format for each role, with {content} in it. train_roles: the roles whose content is trained; of
    a trained role's format, what stands before {content} (right-stripped: "Assistant:") is the prompt.
    collapse_blank_lines: strip contents and take blank lines out of them, as "\\n\\n" ends a turn.
    paragraphs: the assistant's may have blank lines all the same: it ends where a role's name follows one.
    thinks: a reply can begin with a thought between <think> and </think>, which is left out once it is answered.
    thinking: how a thought is asked for, a key of THINKING.
    """

    roles: dict[str, str] = field(default_factory=lambda: dict(WORLD_CHAT))
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    collapse_blank_lines: bool = True
    paragraphs: bool = False
    thinks: bool = False
    thinking: str = "off"

    def __post_init__(self) -> None:
        for role, form in self.roles.items():
            if not isinstance(form, str) or form.count("{content}") != 1:
                raise ValueError(f"Template role {role!r}: {form!r} must hold {{content}} exactly once.")
        for role in self.train_roles:
            self._form(role)
        if self.thinking not in THINKING:
            raise ValueError(f"thinking is {self.thinking!r}, expected {', '.join(THINKING)}")
        if self.thinking != "off" and not self.thinks:
            raise ValueError(f"thinking {self.thinking}: this template's model was not taught to think; use off")

    @classmethod
    def load(cls, path: str | Path) -> "Template":
        """Read a YAML file with any of the fields as keys; ValueError if it is not that."""
        try:
            values = read_yaml(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"Template {path} cannot be read ({error}).") from None
        switches = ("collapse_blank_lines", "paragraphs", "thinks")
        types = {"roles": dict, "train_roles": list} | dict.fromkeys(switches, bool) | {"thinking": str}
        if not isinstance(values, dict) or not values.keys() <= types.keys():
            raise ValueError(f"Template {path}: expected the keys {', '.join(types)}, found {values!r:.200}.")
        if isinstance(asked := values.get("thinking"), bool):  # what on and off are in YAML
            values["thinking"] = "on" if asked else "off"
        for key, value in values.items():
            if not isinstance(value, types[key]):
                raise ValueError(f"Template {path}: {key} must be a {types[key].__name__}, not {value!r:.200}.")
        return cls(**values)

    def segments(self, messages: Sequence[dict]) -> list[Segment]:
        """Segments of a chat. A message of "weight": 0 is not trained; what is one piece stays one piece, so that its
        tokens do not depend on weights. Empty system messages are left out; any other empty one is a ValueError.
        """
        return [(text, trained) for text, _, trained in self._pieces(messages, len(messages))]

    def history(self, messages: Sequence[dict]) -> list[str]:
        """Messages that have been said, in the pieces in which training encodes them: a later one was answered, so that
        there are no thoughts in them any more."""
        return [text for text, *_ in self._pieces(messages)]

    def _pieces(self, messages: Sequence[dict], newest: int = 0) -> list[tuple[str, bool, bool]]:
        """(text, whether it is a trained role's, whether it is trained)

        newest: number of the message that is written as a new reply is, with its thought.
        """
        pieces: list[tuple[str, bool, bool]] = []
        for number, raw in enumerate(messages, 1):
            message = read_message(raw, number, self.thinks)
            role = self.role_of(message)
            form = self._form(role)
            content = self.clean(message.content, role)
            if not content.strip():
                if role == "system":
                    continue
                raise ValueError(f"message {number} ({role}) is empty")
            before, after = form.split("{content}")
            if role == "user" and self.thinks:
                content += THINKING[self.thinking].suffix
            if role not in self.train_roles:
                pieces.append((before + content + after, False, False))
                continue
            prompt = before.rstrip()
            text = before[len(prompt) :] + content + after
            if role == "assistant" and self.thinks and number == newest:
                thought = self.clean(message.thought, role)
                if THOUGHT in thought:
                    raise ValueError(f"message {number}: its thought holds {THOUGHT}")
                opening, text = self._with_thought(thought, text, message.weight != 0)
                prompt += opening
            pieces += [(prompt, False, False), (text, True, message.weight != 0)]
        return _merge(pieces)

    def _with_thought(self, thought: str, text: str, trained: bool) -> tuple[str, str]:
        """(what is written of a reply for the model, what it writes itself)"""
        if self.thinking == "fake":
            whole = f" {THINK}\n{THOUGHT}\n{text.lstrip()}"
        elif thought:
            whole = f" {THINK}\n{thought}\n{THOUGHT}\n{text.lstrip()}"
        elif self.opening and not trained:
            return "", text
        elif self.opening:
            raise ValueError(f"the last reply has no thought, and thinking is {self.thinking}; use off or fake")
        else:
            whole = text
        return self.opening, whole.removeprefix(self.opening)

    def messages(self, text: str) -> list[dict] | None:
        """The chat that is written as this text; None if that cannot be told."""
        found: list[dict] = []
        while text:
            for role, form in self.roles.items():
                before, end = form.split("{content}")[0], self.turn_end(role)
                rest = text.removeprefix(before)
                at = end.find(rest)
                if at < 0 and end.before and rest.endswith(end.text):  # the last message
                    at = len(rest) - len(end.text)
                if text.startswith(before) and at >= 0 and rest[:at].strip():
                    content = rest[:at]
                    for asked in THINKING.values() if role == "user" and self.thinks else ():
                        content = content.removesuffix(asked.suffix)
                    found.append({"role": role, "content": content})
                    text = rest[at + len(end.text) :]
                    break
            else:
                return None
        return found

    def role_of(self, message: "Message") -> str:
        """The template's name for a message's role."""
        return message.role if message.role in self.roles else SHAREGPT.get(message.role, message.role)

    def prompt(self, messages: Sequence[dict], role: str = "assistant", opened: bool = True) -> list[str]:
        """What asks for the next message of `role`: the messages so far, then "Assistant:".

        opened: with what is written of a reply for the model, as `thinking` says. In the pieces in which training
        encodes it; a tokenizer may write them otherwise when joined.
        """
        before = self._form(role).split("{content}")[0].rstrip()
        if role == "assistant" and opened:
            before += self.opening
        return [text for text, *_ in _merge([*self._pieces(messages), (before, False, False)])]

    @property
    def opening(self) -> str:
        """What is written of a reply for the model."""
        return THINKING[self.thinking].opening

    def end(self, role: str = "assistant") -> str:
        """What comes after a message of a role."""
        return self._form(role).split("{content}")[1]

    def turn_end(self, role: str = "assistant") -> TurnEnd:
        """What tells that a message of a role has ended."""
        text = self.end(role)
        if not (self.paragraphs and role == "assistant"):
            return TurnEnd(text)
        return TurnEnd(text, tuple(form.split("{content}")[0].rstrip() for form in self.roles.values()))

    def written(self, reply: str, ended: bool) -> str:
        """A reply as it stands in a history, after its prompt. ended: with its end."""
        before = self._form("assistant").split("{content}")[0]
        return (before[len(before.rstrip()) :] + reply) * bool(reply) + self.end() * ended

    def for_answers(self) -> "Template":
        """As replies are written that somebody gives: where the model would have to think first, after no thought."""
        return replace(self, thinking="fake") if self.opening == THINKING["on"].opening else self

    def as_dict(self) -> dict:
        """Its fields; those that templates have not always had, only where they are not as usual."""
        return {name: value for name, value in asdict(self).items() if NEW.get(name, ...) != value}

    def as_before(self) -> "Template":
        """What was meant where a template with these roles was not written down: before it could say more."""
        return replace(self, **NEW)

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads back."""
        import yaml

        text = yaml.safe_dump(self.as_dict(), allow_unicode=True, sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")

    def _form(self, role: str) -> str:
        if role not in self.roles:
            raise ValueError(f"role {role!r} is unknown; the template knows {', '.join(self.roles)}")
        return self.roles[role]

    def clean(self, content: str, role: str = "user") -> str:
        """A role's message as it is written: without blank lines and white space around it, unless these stay."""
        if not self.collapse_blank_lines:
            return content
        lines = r"\n{2,}" if self.paragraphs else r"\n\s*\n"
        if ends := self.turn_end(role).before:  # only those that would end it
            lines += f"(?={'|'.join(map(re.escape, ends))})"
        return re.sub(lines, "\n", content.replace("\r\n", "\n").strip())


class Message(NamedTuple):
    """One message. weight: 1 or 0 (not trained), None if it has none. unused: names of its other fields. thought: what
    goes before a reply, "" if there is nothing; emptied: it had one of nothing."""

    role: str
    content: str
    weight: int | None
    unused: tuple[str, ...]
    thought: str = ""
    emptied: bool = False


def read_message(message: object, number: int, thinks: bool = False) -> Message:
    """A message as {"role": text, "content": text} or ShareGPT's {"from": text, "value": text}, with or without the
    "weight" of OpenAI's fine-tuning format. thinks: a thought is told from what follows it, be it in the content or in
    a "reasoning_content". ValueError if it is none; number: which of its chat it is, from 1."""
    left = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(left.get(role), str) and isinstance(left.get(content), str):
            found, weight = (left.pop(role), left.pop(content)), left.pop("weight", None)
            if isinstance(weight, bool) or weight not in (None, 0, 1):
                raise ValueError(f"message {number}: weight {weight!r:.60} must be 0 (not trained) or 1 (trained)")
            if not thinks or found[0] not in ("assistant", "gpt"):
                return Message(*found, weight, tuple(left))
            thought, text = split_thought(found[1])
            beside = left.pop(REASONING, "")
            if not isinstance(beside, str) or (thought and beside.strip()):
                what = "is no text" if not isinstance(beside, str) else "stands beside a thought in the content"
                raise ValueError(f"message {number}: {REASONING} {what}")
            emptied = text != found[1] and not thought
            return Message(found[0], text, weight, tuple(left), thought or beside.strip(), emptied)
    raise ValueError(f'message {number} must be {{"role": text, "content": text}}, found {message!r:.60}')


def split_thought(text: str) -> tuple[str, str]:
    """(the thought with which a reply begins, what follows it), each "" if it is not there."""
    begun = text.lstrip()
    if not begun.startswith(THINK):
        return "", text
    thought, _, reply = begun.removeprefix(THINK).partition(THOUGHT)
    return thought.strip(), reply.lstrip()


def _merge(pieces: list[tuple[str, bool, bool]]) -> list[tuple[str, bool, bool]]:
    """Join neighbours that are trained alike, so that they are tokenised as generation tokenises them."""
    merged: list[tuple[str, bool, bool]] = []
    for text, *alike in pieces:
        if merged and merged[-1][1:] == tuple(alike):
            merged[-1] = (merged[-1][0] + text, *alike)
        elif text:
            merged.append((text, *alike))
    return merged
