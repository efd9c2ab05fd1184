"""Corrections as training data: chats, and preferences."""

import json
from pathlib import Path

from rwkv_train.data.templates import Template
from rwkv_train.feedback.correction import Correction
from rwkv_train.files import replace_file


def export(corrections: list[Correction], template: Template, path: Path) -> None:
    """Write corrections as chats that `prepare` reads, and those with a wrong reply to PATH.pairs.jsonl.

    corrections: with their right answers.
    """
    chats, pairs = [], []
    for c in corrections:
        asked = {"role": "user", "content": c.question}
        chats.append({"messages": [asked, {"role": "assistant", "content": c.answer}]})
        if c.rejected is not None:
            prompt = "".join(template.prompt([asked]))
            pairs.append({"prompt": prompt, "chosen": c.answer, "rejected": c.rejected})
    for target, records in ((path, chats), (path.with_name(path.name + ".pairs.jsonl"), pairs)):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        replace_file(target, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
