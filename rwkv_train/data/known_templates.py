"""How chats are written for released models, by a name, and the name by what their files are called.

World and Raven: the notes of their makers. G1: RWKV7-G1x-templates.txt of the repository RWKV-LM.
"""

import re
from pathlib import Path

from rwkv_train.data.templates import Template

BOB_AND_ALICE = {"user": "Bob: {content}\n\n", "assistant": "Alice: {content}\n\n"}
NAMED = {
    "world": Template(),
    "g1": Template(paragraphs=True, thinks=True),
    "raven": Template(BOB_AND_ALICE),
}
FILES = {"g1": r"rwkv-?7-?g\d", "raven": r"rwkv-?4-?raven", "world": r"rwkv-?[x\d.]*-?(?:x0\d0-)?world"}


def named_template(spec: str | Path) -> Template:
    """A template by its name in NAMED, or out of a YAML file. ValueError if it is neither."""
    if str(spec) in NAMED:
        return NAMED[str(spec)]
    if not Path(spec).exists():
        raise ValueError(f"there is no template {spec}, and no such file; name {', '.join(NAMED)}, or a YAML file")
    return Template.load(spec)


def template_of(file: str | Path) -> tuple[str, Template] | None:
    """(the name, the template) of the series that a model's file or folder is named after; None for any other."""
    name = Path(file).name.lower()
    return next(((kind, NAMED[kind]) for kind, pattern in FILES.items() if re.match(pattern, name)), None)
