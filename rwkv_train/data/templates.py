"""How the messages of a chat become text, and which parts of it are trained.

A segment is (text, trained).
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass
class Template:
    """How chat messages are written; the default is the format RWKV's World models are trained on.

    roles: a format for each role, with {content} in it. train_roles: the roles whose content is trained; of
    a trained role's format, what stands before {content} (right-stripped: "Assistant:") is the prompt.
    collapse_blank_lines: strip contents and take blank lines out of them, as "\\n\\n" ends a turn.
    """

    roles: dict[str, str] = field(default_factory=lambda: dict(WORLD_CHAT))
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    collapse_blank_lines: bool = True

    def __post_init__(self) -> None:
        for role, form in self.roles.items():
            if not isinstance(form, str) or form.count("{content}") != 1:
                raise ValueError(f"Template role {role!r}: {form!r} must hold {{content}} exactly once.")
        for role in self.train_roles:
            self._form(role)

    @classmethod
    def load(cls, path: str | Path) -> "Template":
        """Read a YAML file with any of the fields as keys; ValueError if it is not that."""
        try:
            values = read_yaml(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"Template {path} cannot be read ({error}).") from None
        types = {"roles": dict, "train_roles": list, "collapse_blank_lines": bool}
        if not isinstance(values, dict) or not values.keys() <= types.keys():
            raise ValueError(f"Template {path}: expected the keys {', '.join(types)}, found {values!r:.200}.")
        for key, value in values.items():
            if not isinstance(value, types[key]):
                raise ValueError(f"Template {path}: {key} must be a {types[key].__name__}, not {value!r:.200}.")
        return cls(**values)

    def segments(self, messages: Sequence[dict]) -> list[Segment]:
        """Segments of a chat. A message of "weight": 0 is not trained; what is one piece stays one piece, so that its
        tokens do not depend on weights. Empty system messages are left out; any other empty one is a ValueError.
        """
        return [(text, trained) for text, _, trained in self._pieces(messages)]

    def _pieces(self, messages: Sequence[dict]) -> list[tuple[str, bool, bool]]:
        """(text, whether it is a trained role's, whether it is trained)"""
        pieces: list[tuple[str, bool, bool]] = []
        for number, raw in enumerate(messages, 1):
            message = read_message(raw, number)
            role = self.role_of(message)
            form = self._form(role)
            content = self.clean(message.content)
            if not content.strip():
                if role == "system":
                    continue
                raise ValueError(f"message {number} ({role}) is empty")
            before, after = form.split("{content}")
            if role in self.train_roles:
                prompt = before.rstrip()
                text = before[len(prompt) :] + content + after
                pieces += [(prompt, False, False), (text, True, message.weight != 0)]
            else:
                pieces.append((before + content + after, False, False))
        return _merge(pieces)

    def messages(self, text: str) -> list[dict] | None:
        """The chat that is written as this text; None if that cannot be told."""
        found: list[dict] = []
        while text:
            for role, form in self.roles.items():
                before, after = form.split("{content}")
                content, end, rest = text.removeprefix(before).partition(after) if after else (text, "", text)
                if end and text.startswith(before) and content.strip():
                    found.append({"role": role, "content": content})
                    text = rest
                    break
            else:
                return None
        return found

    def role_of(self, message: "Message") -> str:
        """The template's name for a message's role."""
        return message.role if message.role in self.roles else SHAREGPT.get(message.role, message.role)

    def prompt(self, messages: Sequence[dict], role: str = "assistant") -> list[str]:
        """What asks for the next message of `role`: the messages so far, then "Assistant:".

        In the pieces in which training encodes it; a tokenizer may write them otherwise when joined.
        """
        before = self._form(role).split("{content}")[0].rstrip()
        return [text for text, *_ in _merge([*self._pieces(messages), (before, False, False)])]

    def end(self, role: str = "assistant") -> str:
        """What comes after a message of a role."""
        return self._form(role).split("{content}")[1]

    def as_dict(self) -> dict:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads back."""
        import yaml

        text = yaml.safe_dump(self.as_dict(), allow_unicode=True, sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")

    def _form(self, role: str) -> str:
        if role not in self.roles:
            raise ValueError(f"role {role!r} is unknown; the template knows {', '.join(self.roles)}")
        return self.roles[role]

    def clean(self, content: str) -> str:
        """A message's content as it is written: without blank lines and white space around it, unless these stay."""
        if not self.collapse_blank_lines:
            return content
        return re.sub(r"\n\s*\n", "\n", content.replace("\r\n", "\n").strip())


class Message(NamedTuple):
    """One message. weight: 1 or 0 (not trained), None if it has none. unused: names of its other fields."""

    role: str
    content: str
    weight: int | None
    unused: tuple[str, ...]


def read_message(message: object, number: int) -> Message:
    """A message as {"role": text, "content": text} or ShareGPT's {"from": text, "value": text}, with or without the
    "weight" of OpenAI's fine-tuning format. ValueError if it is none; number: which of its chat it is, from 1."""
    left = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(left.get(role), str) and isinstance(left.get(content), str):
            found, weight = (left.pop(role), left.pop(content)), left.pop("weight", None)
            if isinstance(weight, bool) or weight not in (None, 0, 1):
                raise ValueError(f"message {number}: weight {weight!r:.60} must be 0 (not trained) or 1 (trained)")
            return Message(*found, weight, tuple(left))
    raise ValueError(f'message {number} must be {{"role": text, "content": text}}, found {message!r:.60}')


def _merge(pieces: list[tuple[str, bool, bool]]) -> list[tuple[str, bool, bool]]:
    """Join neighbours that are trained alike, so that they are tokenised as generation tokenises them."""
    merged: list[tuple[str, bool, bool]] = []
    for text, *alike in pieces:
        if merged and merged[-1][1:] == tuple(alike):
            merged[-1] = (merged[-1][0] + text, *alike)
        elif text:
            merged.append((text, *alike))
    return merged
