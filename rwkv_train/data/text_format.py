"""What a text was made with, which goes from a store to the run and to every model written from it.

As files in their folders, and compared wherever a model and a text meet.
"""

from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.templates import Template
from rwkv_train.tokenizer import Tokenizer, load_tokenizer, tokenizer_file

TEMPLATE_FILE = "template.yaml"


class TextFormat(NamedTuple):
    """The tokenizer, with its end of document, and how chats are written; None is unknown."""

    tokenizer: Tokenizer | None = None
    template: Template | None = None

    @classmethod
    def read(cls, folder: Path, eod: int | None = None) -> "TextFormat":
        """What a folder's files say. eod: the end of document, where they do not say it."""
        template = folder / TEMPLATE_FILE
        return cls(
            load_tokenizer(folder, eod) if tokenizer_file(folder).is_file() else None,
            Template.load(template) if template.is_file() else None,
        )

    def save(self, folder: Path) -> list[str]:
        """Write what is known into a folder, for `read`; returns the files' names."""
        names = self.tokenizer.save_in(folder) if self.tokenizer else []
        if self.template:
            self.template.save(folder / TEMPLATE_FILE)
            names.append(TEMPLATE_FILE)
        return names


def compare(name: str | Path, ours: Tokenizer | None, other: str | Path, theirs: Tokenizer | None, remedy: str) -> str:
    """What cannot be compared, in a line, or "". Raises ValueError, naming both, where two tokenizers differ."""
    if ours and theirs:
        if (ours.fingerprint, ours.eod) != (theirs.fingerprint, theirs.eod):
            raise ValueError(f"{other} was made with the tokenizer {theirs}, and {name} with {ours}; {remedy}")
        return ""
    if not ours and not theirs:
        return f"neither {name} nor {other} says which tokenizer it was made with; they are taken to be the same"
    unknown, known, tokenizer = (name, other, theirs) if theirs else (other, name, ours)
    return f"{unknown} does not say which tokenizer it was made with; taken to be that of {known}, {tokenizer}"


def compare_templates(name: str | Path, ours: Template | None, other: str | Path, theirs: Template | None) -> str:
    """How chats are written otherwise, in a line, or "" if they are not, or nothing is known of one of them."""
    names = ("collapse_blank_lines", "paragraphs", "thinks", "thinking")  # what is trained is no matter of a text
    one, two = (t.roles | {n: getattr(t, n) for n in names} if t else {} for t in (ours, theirs))
    ways = "; ".join(f"{n} {two.get(n)!r}, not {one.get(n)!r}" for n in {**one, **two} if one.get(n) != two.get(n))
    if not ours or not theirs or not ways:
        return ""
    return f"chats of {other} are written otherwise than those of {name}: {ways}"
