"""What a text was made with, which goes from a store to the run and to every model written from it.

As files, tokenizer.json and template.yaml; compared wherever a model and a text meet.
"""

from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.templates import Template
from rwkv_train.tokenizer import Tokenizer, load_tokenizer

TEMPLATE_FILE = "template.yaml"


class TextFormat(NamedTuple):
    """The tokenizer, with its end of document, and how chats are written; None is unknown."""

    tokenizer: Tokenizer | None = None
    template: Template | None = None

    @classmethod
    def read(cls, folder: Path) -> "TextFormat":
        """What a folder's files say."""
        template = folder / TEMPLATE_FILE
        return cls(
            load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None,
            Template.load(template) if template.is_file() else None,
        )

    def save(self, folder: Path) -> None:
        """Write what is known into a folder, for `read`."""
        if self.tokenizer:
            self.tokenizer.save(folder / "tokenizer.json")
        if self.template:
            self.template.save(folder / TEMPLATE_FILE)
