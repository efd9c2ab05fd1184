"""Other ways to ask the same: by rules that are safe in any talk, and by the model itself."""

import re

import torch

from rwkv_train.feedback.decode import Form, decode
from rwkv_train.feedback.words import UNSPACED
from rwkv_train.models.base import RWKV

LONGEST = 32  # tokens of a rewording
AGAIN = ("Could you say that in other words?", "你能换个说法吗？")  # to a text in spaced and unspaced script
ENDS = " .?!。？！"
WH = re.compile(r"(what|who|where|when)(?:'s| is| are) (?=(?:an?|the|your|my|our|this|that)\b)", re.IGNORECASE)


def by_rule(question: str) -> list[str]:
    """Other ways to write a question, without a change of its meaning."""
    bare = question.strip().rstrip(ENDS)
    if not bare:
        return []
    if UNSPACED.search(bare):
        begun = re.sub(r"^(请问|告诉我|你知道)", "", bare)
        made = [f"请问{begun}？", begun, f"告诉我，{begun}。", f"我想知道，{begun}？"]
    else:
        low = bare[0].lower() + bare[1:] if not re.match(r"I\b", bare) and bare[:2] != bare[:2].upper() else bare
        made = [low, f"Tell me, {low}?", f"{bare}, please?"]
        if begun := WH.match(bare):
            rest, verb = bare[begun.end() :], "are" if begun[0].lower().endswith("are ") else "is"
            made = [f"Tell me {begun[1].lower()} {rest} {verb}.", low, f"Do you know {begun[1].lower()} {rest} {verb}?"]
    return [text for text in dict.fromkeys(made) if text != question]


def reworded(model: RWKV, form: Form, question: str, count: int) -> list[str]:
    """Up to `count` texts that the model writes when it is asked to say a question in other words. Always the same."""
    request = AGAIN[1 if UNSPACED.search(question) else 0]
    prompt = [*form.prompt(question), *form.answer(request), *form.opening()]
    rng, end = torch.Generator().manual_seed(0), form.template.end("user")
    written = decode(model, form.tokenizer, [prompt] * count, end, max_new_tokens=LONGEST, rng=rng) if count else []
    return [text for ids in written if (text := form.shown(ids, "user"))]
