"""Corrections as a file says them: a line each, or the journal of another profile.

What belongs to a correction stands behind it, in the order in which it is learnt.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from rwkv_train.data.templates import SHAREGPT, read_message
from rwkv_train.feedback import Correction, Reading
from rwkv_train.feedback.correction import item_of
from rwkv_train.feedback.journal import Ledger, read
from rwkv_train.files import BadJSON, parse_json

EXPECTED = 'expected {"question": ..., "answer": ...}, both of them text, or {"messages": [...]}'


@dataclass(frozen=True)
class Taught:
    """A correction, or what belongs to one.

    where: it stands. before: messages of the dialogue before it. of: the one it belongs to, as another way to ask it or
    a question that keeps its answer.
    """

    where: str
    item: Correction | Reading
    before: list[dict] = field(default_factory=list)
    of: "Taught | None" = None


def taught_by(where: str, line: str, ignored: Counter[str]) -> list[Taught]:
    """What a line says; the fields that corrections do not have are counted in `ignored`."""
    try:
        found = parse_json(line)
    except BadJSON as error:
        raise ValueError(f"{where}: {error}; put one correction on each line") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {EXPECTED}")
    found = {name: value for name, value in found.items() if value is not None}
    belonging = [(name == "not", text) for name in ("also", "not") for text in _texts(where, name, found.pop(name, []))]
    said = [text.strip() for _, text in belonging]
    if twice := [text for text in said if said.count(text) > 1]:
        raise ValueError(f"{where}: also and not have {twice[0]!r} twice; give it once")
    try:
        if "messages" in found:
            before, question, answer = _of_messages(found.pop("messages"), ignored)
            if twice := found.keys() & {"question", "answer", "before"}:
                raise ValueError(f"found both messages and {min(twice)}; give one of them")
        else:
            before = _of_turns(found.pop("before", []))
            question, answer = found.pop("question", None), found.pop("answer", None)
            if not (isinstance(question, str) and isinstance(answer, str)):
                raise ValueError(EXPECTED)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    ignored.update(found.keys())
    root = Taught(where, Correction(question, answer), before)
    return [root, *(Taught(where, Correction(text, answer, keeps=keeps), before, root) for keeps, text in belonging)]


def of_profile(folder: Path) -> tuple[str, list[Taught]]:
    """(what of it is left out, the corrections that count in a profile, which may be of another model).

    What was said before a correction is known there as tokens of its model, and left out. Raises ValueError if the
    folder holds no sound journal.
    """
    path = folder / "journal.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is no profile: it holds no journal.jsonl; name a file of corrections, or a profile")
    ledger = Ledger(read(path))
    active = [r for r in (*ledger.sequence.values(), *ledger.waiting.values()) if r["kind"] == "received"]
    taught: dict[int, Taught] = {}
    dialogues = 0
    for record in active:
        item, of = item_of(record), None
        if isinstance(item, Correction):
            dialogues += bool(item.context) and item.of is None
            of, item = taught.get(item.of), replace(item, context=(), of=None)
        taught[record["id"]] = Taught(f"{path}:{record['id']}", item, of=of)
    left = f"left out of {folder}: the dialogues before {dialogues} of its corrections, as they are its model's tokens"
    return left if dialogues else "", list(taught.values())


def _texts(where: str, name: str, value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{where}: {name} must be a text or a list of texts, found {value!r:.60}")
    return texts


def _of_turns(turns: object) -> list[dict]:
    pairs = isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    if not (pairs and all(isinstance(text, str) for turn in turns for text in turn)):
        raise ValueError(f"before must be a list of turns [user's text, reply], found {turns!r:.60}")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _of_messages(raw: object, ignored: Counter[str]) -> tuple[list[dict], str, str]:
    """(the messages before, question, answer) of a chat that ends with both."""
    messages = [read_message(m, n) for n, m in enumerate(raw, 1)] if isinstance(raw, list) else []
    if [SHAREGPT.get(m.role, m.role) for m in messages[-2:]] != ["user", "assistant"]:
        raise ValueError("messages must end with a user's and the assistant's, which is the right answer")
    if messages[-1].weight == 0:
        raise ValueError("the last message has weight 0, so it is not to be learnt; leave that chat out")
    ignored.update({name for m in messages for name in m.unused})
    before = [{"role": m.role, "content": m.content} for m in messages[:-2]]
    return before, messages[-2].content, messages[-1].content
