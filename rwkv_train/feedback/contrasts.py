"""Questions made up around one, to see how far a new answer may reach.

They are crossings with the questions of the rehearsal set: this one asked of their subjects, and they asked of its
subject. What the model answers to each tells whether it is a paraphrase or a contrast; what becomes of them stands in
lesson.py.
"""

from itertools import islice
from typing import NamedTuple

from rwkv_train.feedback.decode import MAX_NEW_TOKENS, greedy
from rwkv_train.feedback.rehearsal import RehearsalSet, nearest
from rwkv_train.feedback.subjects import subjects_of
from rwkv_train.feedback.texts import log_probs
from rwkv_train.models.base import RWKV

ALIKE = 0.25  # of the others put in its subject's place that may be answered as it is


class Made(NamedTuple):
    """A question made up: its text, its prompt, the greedy reply of the model to it and that of the base."""

    question: str
    prompt: list[int]
    now: list[int]
    before: list[int]


class Around(NamedTuple):
    """Questions made up around one.

    reply: the model's reply to the one itself. subject: what that is about, "" if that cannot be told.
    """

    reply: list[int]
    subject: str
    made: list[Made]


def around(rehearsal: RehearsalSet, model: RWKV, question: str, subjects: int, forms: int) -> Around:
    """Questions made up around one, and what the model answers to all of them.

    They are crossings with the nearest questions of the set: this one asked of up to `subjects` others, and up to
    `forms` others asked of its subject, those before these. What it is about is what the answer depends on: of its
    rare words, the one that others in its place change most answers.
    """
    form, tried = rehearsal.form, []
    asked = form.prompt(question)
    for subject in candidates(rehearsal, question):
        elsewhere, otherwise = _crossed(rehearsal, question, subject, subjects, forms)
        texts = [text for text in dict.fromkeys(elsewhere + otherwise) if text != question]
        prompts = [form.prompt(text) for text in texts]
        own, *now = greedy(model, form, [asked, *prompts])
        alike = [reply == own for text, reply in zip(texts, now, strict=True) if text in elsewhere]
        tried.append((sum(alike) / max(1, len(alike)), subject, texts, prompts, now))
        if tried[-1][0] < ALIKE:
            break
    alike, subject, texts, prompts, now = min(tried, key=lambda t: t[0], default=(1.0, "", [], [], []))
    if alike > 0.5:
        return Around(greedy(model, form, [asked])[0], "", [])
    before = now if model is rehearsal.base or not prompts else replies_of_base(rehearsal, prompts, now)
    return Around(own, subject, [Made(*parts) for parts in zip(texts, prompts, now, before, strict=True)])


def candidates(rehearsal: RehearsalSet, question: str) -> list[str]:
    """What a question may be about, the likeliest first."""
    (words,) = subjects_of(rehearsal.base, rehearsal.form, rehearsal.rarity, [question])
    return [word for word in words if word in question]


def _crossed(
    rehearsal: RehearsalSet, question: str, ours: str, subjects: int, forms: int
) -> tuple[list[str], list[str]]:
    """(a question asked of others, others asked of its subject), the nearest first."""
    order = nearest(rehearsal.form.begun(question), rehearsal.tokens_of_asked)
    # A piece of a character is no subject.
    pairs = [(asked, theirs) for asked, theirs in (rehearsal.asked[i] for i in order) if theirs and theirs in asked]
    elsewhere = dict.fromkeys(question.replace(ours, theirs) for _, theirs in pairs)
    otherwise = dict.fromkeys(asked.replace(theirs, ours) for asked, theirs in pairs)
    return list(islice(elsewhere, subjects)), list(islice(otherwise, forms))


def replies_of_base(rehearsal: RehearsalSet, prompts: list[list[int]], now: list[list[int]]) -> list[list[int]]:
    """The base's greedy replies to prompts: mostly those of now, which reading them tells faster than decoding."""
    base, form = rehearsal.base, rehearsal.form
    replies, end, others = list(now), form.template.end(), []
    texts = [prompt + reply for prompt, reply in zip(prompts, now, strict=True)]
    counts = [1 + len(reply) for reply in now]
    best = log_probs(base, texts, counts).argmax(-1).split(counts)
    for i, reply in enumerate(now):
        *written, after = best[i].tolist()
        ended = len(reply) == MAX_NEW_TOKENS or (end and end in form.tokenizer.decode(reply[-8:]))
        if written != reply or not (ended or after == form.tokenizer.eod):
            others.append(i)
    if others:
        for i, reply in zip(others, greedy(base, form, [prompts[i] for i in others]), strict=True):
            replies[i] = reply
    return replies
