"""What a text was made with, which goes from a store to the run and to every model written from it.

As files in their folders, and compared wherever a model and a text meet.
"""

from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.chat_program import to_jinja
from rwkv_train.data.chat_template import from_jinja
from rwkv_train.data.templates import Template
from rwkv_train.files import read_text
from rwkv_train.program import told
from rwkv_train.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from rwkv_train.tokenizer_json import said_in

TEMPLATE_FILE = "template.yaml"
JINJA_FILE = "chat_template.jinja"  # where transformers writes it since 4.52; read before that in TOKENIZER_CONFIG
TOKENIZER_CONFIG = "tokenizer_config.json"


class TextFormat(NamedTuple):
    """The tokenizer, with its end of document, and how chats are written; None is unknown."""

    tokenizer: Tokenizer | None = None
    template: Template | None = None

    @classmethod
    def read(cls, folder: Path, eod: int | None = None) -> "TextFormat":
        """What a folder's files say. eod: the end of document, where they do not say it.

        Without a template.yaml, a chat template of Hugging Face is read; what of it cannot be, is told.
        """
        tokenizer = load_tokenizer(folder, eod) if tokenizer_file(folder).is_file() else None
        template = folder / TEMPLATE_FILE
        return cls(tokenizer, Template.load(template) if template.is_file() else _foreign_template(folder, tokenizer))

    def save(self, folder: Path) -> None:
        """Write what is known into a folder, for `read`."""
        if self.tokenizer:
            self.tokenizer.save_in(folder)
        if self.template:
            self.template.save(folder / TEMPLATE_FILE)

    def export(self, folder: Path) -> list[str]:
        """Write what is known into a folder, for `read` and for AutoTokenizer; returns the files' names."""
        names = []
        if self.tokenizer:
            names += self.tokenizer.export_in(folder, to_jinja(self.template) if self.template else None)
        if self.template:
            self.template.save(folder / TEMPLATE_FILE)
            names.append(TEMPLATE_FILE)
        return names


def _foreign_template(folder: Path, tokenizer: Tokenizer | None) -> Template | None:
    """The chat template that transformers takes from a folder, as a Template; None if there is none that can be."""
    config = folder / TOKENIZER_CONFIG
    program = read_text(folder / JINJA_FILE) if (folder / JINJA_FILE).is_file() else said_in(config, "chat_template")
    if isinstance(program, list):  # several, each with its name
        program = next((p.get("template") for p in program if isinstance(p, dict) and p.get("name") == "default"), None)
    if not isinstance(program, str):
        return None
    said = {name: said_in(config, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in said.items()}
    special = tokenizer.special_tokens if tokenizer else []
    try:
        template, notes = from_jinja(program, {name: token for name, token in tokens.items() if token}, special)
    except ValueError as error:
        told(f"{folder}: its chat template is passed over, as it {error}; say how chats are written with --template")
        return None
    for note in notes:
        told(f"{folder}: its chat template {note}")
    return template


def alike_in_one(tokenizer: Tokenizer, template: Template) -> bool:
    """Whether a chat that is encoded as one text, as transformers does it, has the ids of its pieces, as here."""
    contents = ("Why?", "it is 7", "f(x) { }", "\u4f60\u597d\u3002", "\U0001f600", "*\\*", '"yes"')
    chat = [{"role": role, "content": content} for content in contents for role in template.roles]
    pieces = [text for text, _ in template.segments(chat)]
    return tokenizer.encode("".join(pieces)) == [i for piece in pieces for i in tokenizer.encode(piece)]


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
