"""Corrections as training data: chats, and preferences."""

import json
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.feedback.correction import Correction, outdated
from rwkv_train.feedback.decode import Form
from rwkv_train.files import replace_file


@dataclass(frozen=True)
class Exported:
    """How many chats were written: of corrections, of other ways to ask these, of questions that keep their answer.

    alone: of them, those whose dialogue before could not be told from its tokens, and is left out. replaced: how many
    were not written, as their question has another answer by now.
    """

    corrections: int
    also: int
    kept: int
    alone: int
    replaced: int

    @property
    def chats(self) -> int:
        return self.corrections + self.also + self.kept


def export(corrections: list[Correction], form: Form, path: Path) -> Exported:
    """Write corrections as chats that `prepare` reads, and those with a wrong reply to PATH.pairs.jsonl.

    Written are those with a right answer, of several answers to one question the last. Only these are trained, not the
    replies before them. Raises ValueError, writing nothing, where one of the files is there.
    """
    targets = [path, path.with_name(path.name + ".pairs.jsonl")]
    if there := next((str(target) for target in targets if target.exists()), ""):
        raise ValueError(f"{there} is there already; delete it, or name another file")
    valid = {(c.question, c.answer) for c, old in zip(corrections, outdated(corrections), strict=True) if not old}
    answered = [c for c in corrections if c.answer is not None]
    written = [c for c in answered if (c.question, c.answer) in valid]
    chats, pairs, alone = [], [], 0
    for c in written:
        before = form.template.messages(form.tokenizer.decode(list(c.context)))
        alone += before is None
        asked = [*(before or []), {"role": "user", "content": c.question}]
        untrained = [m | {"weight": 0} if m["role"] == "assistant" else m for m in asked]
        chats.append({"messages": [*untrained, {"role": "assistant", "content": c.answer}]})
        if c.rejected is not None:
            pairs.append({"prompt": "".join(form.template.prompt(asked)), "chosen": c.answer, "rejected": c.rejected})
    for target, records in zip(targets, (chats, pairs), strict=True):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        replace_file(target, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    kept, also = sum(c.keeps for c in written), sum(c.of is not None and not c.keeps for c in written)
    return Exported(len(written) - kept - also, also, kept, alone, len(answered) - len(written))
