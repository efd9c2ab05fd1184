"""Other ways to ask the same: by rules that are safe in any talk, and by the model itself."""

import re

import torch

from rwkv_train.feedback.decode import Form, decode
from rwkv_train.feedback.texts import log_probs
from rwkv_train.feedback.words import UNSPACED, Vocabulary
from rwkv_train.models.base import RWKV

LONGEST = 24  # tokens of a rewording
TEMPERATURE = 0.6  # at which it is sampled
TELLING = 0.25  # of a question's contrasts that may have its reply before that tells nothing
AGAIN = ("Could you say that in other words?", "你能换个说法吗？")  # to a text in spaced and unspaced script
ENDS = " .?!。？！"
ASKS = re.compile(
    r"(?:wh\w+|how|is|are|am|was|were|do|does|did|can|could|will|would|shall|should|may|must|have|has|had)\b",
    re.IGNORECASE,
)
ASKS_UNSPACED = re.compile("[吗呢么谁哪几啥怎]|多少")
WH = re.compile(r"(what|who|where|when)(?:'s| is| are) (?=(?:an?|the|your|my|our|this|that)\b)", re.IGNORECASE)


def by_rule(text: str) -> list[str]:
    """Other ways to write a text, without a change of its meaning; more of them if it asks something."""
    bare = text.strip().rstrip(ENDS)
    if not bare:
        return []
    made, asks = [bare], text.strip()[-1] in "?？"
    if UNSPACED.search(bare):
        begun = re.sub(r"^(请问|告诉我|你知道)", "", bare)
        if asks or ASKS_UNSPACED.search(bare):
            made = [f"请问{begun}？", begun, f"告诉我，{begun}。", f"我想知道，{begun}？"]
    else:
        low = bare[0].lower() + bare[1:] if not re.match(r"I\b", bare) and bare[:2] != bare[:2].upper() else bare
        made.append(low)
        if begun := WH.match(bare):
            rest, verb = bare[begun.end() :], "are" if begun[0].lower().endswith("are ") else "is"
            made = [f"Tell me {begun[1].lower()} {rest} {verb}.", low, f"Do you know {begun[1].lower()} {rest} {verb}?"]
        elif asks or ASKS.match(bare):
            made = [low, f"Tell me, {low}?", f"{bare}, please?"]
    return [other for other in dict.fromkeys(made) if other != text]


def reworded(model: RWKV, form: Form, question: str, count: int) -> list[str]:
    """Up to `count` texts that the model writes when it is asked to say a question in other words. Always the same."""
    request = AGAIN[1 if UNSPACED.search(question) else 0]
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": request}]
    prompt = [form.tokenizer.eod, *form.dialogue(said), *form.opening()]
    rng, end = torch.Generator().manual_seed(0), form.template.turn_end("user")
    written = decode(model, form.tokenizer, [prompt] * count, end, None, LONGEST, rng, TEMPERATURE) if count else []
    return list(dict.fromkeys(text for ids in written if (text := form.shown(ids, "user"))))


def understood(
    question: str, reply: list[int], tried: list[str], contrasts: list[str], model: RWKV, form: Form, words: Vocabulary
) -> list[str]:
    """Which of some texts a model understands as it does a question, by its reply to them.

    The same reply tells that, unless contrasts get it, too: then a text must have the question's content words. Nor may
    it share with the reply a word that the question has not: then the model may have read that word into the question.
    """
    if not (reply and tried):
        return []
    texts = [*tried, *contrasts]
    best = log_probs(model, [form.prompt(text) + reply[:-1] for text in texts], [len(reply)] * len(texts)).argmax(-1)
    same = (best.cpu().view(len(texts), -1) == torch.tensor(reply)).all(-1).tolist()
    telling = sum(same[len(tried) :]) <= TELLING * len(contrasts)
    content, asked, replied = _content(words, question), question.lower(), form.shown(reply).lower()
    found = []
    for text in (text for text, alike in zip(tried, same, strict=False) if alike):
        read_in = any(word in replied and word not in asked for word in _content(words, text))
        if all(word in text.lower() for word in content) or (telling and not read_in):
            found.append(text)
    return found


def _content(words: Vocabulary, text: str) -> list[str]:
    return [word.text.lower() for word in words.content(text)]
