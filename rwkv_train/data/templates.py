"""Records to segments: which text a document consists of, and which parts of it are trained.

A segment is (text, trained). Three kinds of record: a text, a prompt with its completion, and the messages
of a chat. `Template` says how messages become text; `Columns` under which names a record keeps its parts.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

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
        import yaml

        try:
            values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"Template {path} cannot be read ({error}).") from None
        types = {"roles": dict, "train_roles": list, "collapse_blank_lines": bool}
        if not isinstance(values, dict) or not values.keys() <= types.keys():
            raise ValueError(f"Template {path}: expected the keys {', '.join(types)}, found {values!r:.200}.")
        for key, value in values.items():
            if not isinstance(value, types[key]):
                raise ValueError(f"Template {path}: {key} must be a {types[key].__name__}, not {value!r:.200}.")
        return cls(**values)

    def segments(self, messages: Sequence[dict]) -> list[Segment]:
        """Segments of a chat. Empty system messages are left out; any other empty one is a ValueError."""
        segments: list[Segment] = []
        for number, message in enumerate(messages, 1):
            role, content = _role_and_content(message, number)
            role = role if role in self.roles else SHAREGPT.get(role, role)
            form = self._form(role)
            content = self._clean(content)
            if not content.strip():
                if role == "system":
                    continue
                raise ValueError(f"message {number} ({role}) is empty")
            before, after = form.split("{content}")
            if role in self.train_roles:
                prompt = before.rstrip()
                segments += [(prompt, False), (before[len(prompt) :] + content + after, True)]
            else:
                segments.append((before + content + after, False))
        return _merge(segments)

    def prompt(self, messages: Sequence[dict], role: str = "assistant") -> list[str]:
        """What asks for the next message of `role`: the messages so far, then "Assistant:".

        In the pieces in which training encodes it; a tokenizer may write them otherwise when joined.
        """
        before = self._form(role).split("{content}")[0].rstrip()
        return [text for text, _ in _merge([*self.segments(messages), (before, False)])]

    def end(self, role: str = "assistant") -> str:
        """What comes after a message of a role."""
        return self._form(role).split("{content}")[1]

    def other(self, there: "Template") -> str:
        """How roles are written otherwise there, as 'user here, there'."""
        names = [role for role in {**self.roles, **there.roles} if self.roles.get(role) != there.roles.get(role)]
        return "; ".join(f"{role} as {self.roles.get(role)!r} here, {there.roles.get(role)!r} there" for role in names)

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

    def _clean(self, content: str) -> str:
        if not self.collapse_blank_lines:
            return content
        return re.sub(r"\n\s*\n", "\n", content.replace("\r\n", "\n").strip())


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

    def detect(self, record: dict) -> str:
        """ "messages", "pairs" or "text": the first of these whose columns the record has."""
        if self.messages in record or (self.messages == "messages" and "conversations" in record):
            return "messages"
        if self.completion in record and self.prompts[0] in record:
            return "pairs"
        if self.text in record:
            return "text"
        expected = f'"{self.text}", "{self.prompt}" with "{self.completion}", or "{self.messages}"'
        flags = "--text-field, --prompt-field and --completion-field, or --messages-field"
        raise ValueError(f"no known column: expected {expected}, found {_names(record)}; name yours with {flags}")


def render(record: object, kind: str, template: Template, columns: Columns) -> list[Segment]:
    """The segments of one record of `kind` ("auto", "text", "pairs" or "messages").

    Raises ValueError that says what is wrong with the record (the caller knows where it lies).
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with named columns, found {record!r:.60}")
    if kind == "auto":
        kind = columns.detect(record)
    if kind == "messages":
        return template.segments(_messages(record, columns))
    if kind == "pairs":
        parts = [_string(record, name, optional=len(columns.prompts) > 1) for name in columns.prompts]
        prompt, completion = "\n".join(part for part in parts if part), _string(record, columns.completion)
        _require(prompt, columns.prompt)
        _require(completion, columns.completion)
        return [(prompt, False), (completion, True)]
    text = _string(record, columns.text)
    _require(text, columns.text)
    return [(text, True)]


def _messages(record: dict, columns: Columns) -> list[dict]:
    name = columns.messages
    if name == "messages" and name not in record and "conversations" in record:
        name = "conversations"
    if name not in record:
        raise ValueError(f'no column "{name}", found {_names(record)}; name yours with --messages-field')
    if not isinstance(record[name], list) or not record[name]:
        raise ValueError(f'"{name}" must be a list of messages, found {record[name]!r:.60}')
    return record[name]


def _role_and_content(message: object, number: int) -> tuple[str, str]:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and role in message and content in message:
            if isinstance(message[role], str) and isinstance(message[content], str):
                return message[role], message[content]
            break
    raise ValueError(f'message {number} must be {{"role": text, "content": text}}, found {message!r:.60}')


def _string(record: dict, name: str, optional: bool = False) -> str:
    """The text in a column; `optional` reads a missing or null one as ""."""
    value = record.get(name)
    if optional and value is None:
        return ""
    if name not in record:
        raise ValueError(f'no column "{name}", found {_names(record)}')
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be text, found {value!r:.60}')
    return value


def _require(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f'"{name}" is empty')


def _names(record: dict) -> str:
    return ", ".join(f'"{name}"' for name in list(record)[:12]) or "none"


def _merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbours that are trained alike, so that they are tokenised as generation tokenises them."""
    merged: list[Segment] = []
    for text, trained in segments:
        if merged and merged[-1][1] == trained:
            merged[-1] = (merged[-1][0] + text, trained)
        elif text:
            merged.append((text, trained))
    return merged
