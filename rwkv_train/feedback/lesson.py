"""The recipe: what one correction trains, and what it keeps.

Trained are the new answer, alone and after other talk, to paraphrases of its question too, and earlier corrections.
Kept, by a KL anchor to what a model said before, are contrasts to the question, and some of the rehearsal set. How the
steps are taken from there: steps.py. How much of the change is accepted: gate.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rwkv_train.feedback.background import half_the_threads
from rwkv_train.feedback.contrasts import Around, around
from rwkv_train.feedback.correction import Correction, Reading, Received, document_of, example_of
from rwkv_train.feedback.decode import MAX_NEW_TOKENS, MAX_REPLY, Form, greedy
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.texts import Example
from rwkv_train.models.base import RWKV

FORMS = 20  # questions of the rehearsal set that are asked of a correction's subject


@dataclass(frozen=True)
class Lesson:
    """What one correction trains and what it keeps.

    new: examples of the correction, the first of them on its own. replayed: of earlier ones. anchored: token ids of
    texts, each with the model whose predictions on it are kept. paraphrases: the other wordings of the question that
    are among `new`. contrasts: the questions made up that are among `anchored`. reply: the ids of the model's reply
    before the lesson.
    """

    new: list[Example]
    replayed: list[Example] = field(default_factory=list)
    anchored: list[tuple[list[int], RWKV]] = field(default_factory=list)
    paraphrases: list[str] = field(default_factory=list)
    contrasts: list[str] = field(default_factory=list)
    reply: list[int] = field(default_factory=list)


def text_lesson(reading: Reading, form: Form) -> Lesson:
    """The lesson of a text that is only read: the whole of it, as dynamic evaluation goes through it."""
    ids = document_of(reading, form)
    return Lesson([Example(ids, len(ids) - 1)])


def lesson_of(
    received: Received,
    earlier: list[Received],
    replaced: Iterable[str],
    model: RWKV,
    rehearsal: RehearsalSet,
) -> Lesson:
    """The lesson of a correction, on top of `model`. The same arguments give the same lesson.

    earlier: what was learnt before it, in that order. replaced: replies that these did away with.
    """
    correction, config, number, form = received.item, received.config, received.id, rehearsal.form
    alone = example_of(correction, form)
    answer = alone.ids[-alone.answer :]
    valid = {it.item.question: it.item for it in earlier if isinstance(it.item, Correction)}  # the last word counts
    valid.pop(correction.question, None)

    # 1. The new answer: to the question alone, in its dialogue, and after talk that has nothing to do with it.
    new = [alone]
    if correction.context:
        ids = [form.tokenizer.eod, *correction.context, *form.turn(correction.question), *answer]
        new.append(Example(ids, alone.answer, 1 + len(correction.context), alone.negative))
    for prefix in _in_turn(rehearsal.free_running, config.random_prefixes, number):
        ids = [*prefix, *form.turn(correction.question), *answer]
        new.append(Example(ids, alone.answer, len(prefix), alone.negative))

    # 2. Earlier corrections.
    replayed = [example_of(it, form) for it in _spread(list(valid.values()), config.replay, number)]

    # 3. Questions around this one: paraphrases learn the answer too, contrasts keep their own.
    with half_the_threads():
        found = around(rehearsal, model, correction.question, config.contrasts, FORMS)
        reply = found.reply
        if len(reply) == MAX_NEW_TOKENS:
            reply = greedy(model, form, [alone.ids[: -alone.answer]], max_new_tokens=MAX_REPLY)[0]
    taught = {tuple(form.answer(it.answer)) for it in valid.values() if it.answer is not None}
    alike, anchored = _parted(found, reply, taught, model, rehearsal.base)
    others = [made.question for made in found.made if (made.question, made.prompt) not in alike]
    contrasts, anchored = (_spread(of, 2 * config.contrasts) for of in (others, anchored))
    paraphrases = [] if alone.negative or correction.keeps else _spread(alike, config.paraphrases)
    new += [Example(prompt + answer, alone.answer) for _, prompt in paraphrases]

    # 4. Some of what the model says by itself, but no reply that a correction did away with.
    away = [reply, *(form.answer(text) for text in replaced if text)]
    anchored += [(ids, rehearsal.base) for ids in rehearsal.near(alone.ids, config.rehearsed, number, away)]
    anchored += [(ids, rehearsal.base) for ids in _in_turn(rehearsal.free_running, config.free_running, -number)]
    return Lesson(new, replayed, anchored, [question for question, _ in paraphrases], contrasts, reply)


def _parted(
    found: Around, reply: list[int], taught: set[tuple[int, ...]], model: RWKV, base: RWKV
) -> tuple[list[tuple[str, list[int]]], list[tuple[list[int], RWKV]]]:
    """(paraphrases with their prompts, contrasts with their replies and the model that gives them).

    A question about the subject that is answered as the corrected one is a paraphrase. All others are contrasts: they
    keep the base's reply, unless another one was taught.
    """
    alike, anchored = [], []
    for question, prompt, now, before in found.made:
        if now == reply and found.subject in question:
            alike.append((question, prompt))
        elif now == before or tuple(now) not in taught:  # where it differs from the base's, that was not meant
            anchored.append((prompt + before, base))
        else:
            anchored.append((prompt + now, model))
    return alike, anchored


def _spread(items: list, count: int, seed: int = 0) -> list:
    """All of them if few, otherwise some, evenly from begin to end, beginning elsewhere for another seed."""
    every = max(1.0, len(items) / max(1, count))
    return [items[int(seed % every + i * every) % len(items)] for i in range(min(count, len(items)))]


def _in_turn(items: list, count: int, number: int) -> list:
    """`count` items, others for the next number, until all have had their turn."""
    return [items[(count * number + i) % len(items)] for i in range(count if items else 0)]
