"""What a benchmark of corrections teaches and asks: cases, and reading them from a file."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from rwkv_train.files import parse_json, read_lines

Turns = tuple[tuple[str, str], ...]


class Asked(NamedTuple):
    """A question, and the turns (user, assistant) of the dialogue before it."""

    before: Turns
    question: str


@dataclass(frozen=True)
class Case:
    """A correction, other ways to ask for it, and questions whose answers must stay.

    paraphrases: the same answer is right for them. neighbours: questions near to it for which it is wrong;
    same_subject: others, about what it is about. kind, language: figures are also told for each of these.
    before: turns (user, assistant) of the dialogue before the question, and before all the others.
    """

    question: str
    answer: str
    paraphrases: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)
    same_subject: list[str] = field(default_factory=list)
    kind: str = ""
    language: str = ""
    before: Turns = ()

    @property
    def asked(self) -> Asked:
        return Asked(self.before, self.question)

    def asking(self, questions: Iterable[str]) -> list[Asked]:
        """Questions after the same turns."""
        return [Asked(self.before, question) for question in questions]


def load_cases(path: str | Path) -> list[Case]:
    """Cases from jsonl, one a line. ValueError, with file and line, for anything else."""
    cases = []
    for number, line in read_lines(path):
        try:
            cases.append(_case(parse_json(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: no case ({error}); it needs question and answer") from None
    if not cases:
        raise ValueError(f"{path} holds no cases; put one correction on each line")
    return cases


def _case(found: object) -> Case:
    if not isinstance(found, dict):
        raise ValueError("no object")
    if unknown := sorted(found.keys() - {f.name for f in fields(Case)}):
        raise ValueError(f"it has no field {unknown[0]}")
    if missing := {"question", "answer"} - found.keys():
        raise ValueError(f"{min(missing)} is missing")
    found = {name: value for name, value in found.items() if value is not None}
    lists = {name: found[name] for name in ("paraphrases", "neighbours", "same_subject") if name in found}
    before = found.get("before", [])
    if not all(isinstance(value, list) for value in [before, *lists.values(), *before]):
        raise ValueError(f"{', '.join(lists)} and before must be lists, and the turns of before, too")
    if not all(len(turn) == 2 for turn in before):
        raise ValueError("each turn of before must be a message and its reply")
    # Older files say what is answered today, too: {"question": ..., "answer": ...}.
    plain = {name: [q["question"] if isinstance(q, dict) else q for q in asked] for name, asked in lists.items()}
    case = Case(**found | plain | {"before": tuple(map(tuple, before))})
    texts = [case.question, case.answer, *(text for some in (*before, *plain.values()) for text in some)]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("questions and answers must be text")
    if not all(isinstance(name, str) for name in (case.kind, case.language)):
        raise ValueError("kind and language must be text")
    return case


def chosen_cases(cases: list[Case], kinds: list[str], limit: int | None) -> list[Case]:
    """The cases of some kinds, of all if none is named, and at most so many of them, from begin to end."""
    there = list(dict.fromkeys(case.kind for case in cases if case.kind))
    if unknown := [kind for kind in kinds if kind not in there]:
        raise ValueError(f"no case is of the kind {unknown[0]!r}; there are: {', '.join(there) or 'none'}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    some = [case for case in cases if not kinds or case.kind in kinds]
    # By the golden ratio: evenly, but in step with nothing that repeats in the file.
    order = sorted(range(len(some)), key=lambda i: i * (5**0.5 - 1) / 2 % 1)
    return [some[i] for i in sorted(order[:limit])]
