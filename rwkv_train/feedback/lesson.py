"""The recipe: what one correction trains, and what it keeps.

Trained are the new answer, alone and after other talk, to paraphrases of its question too, and earlier corrections.
Kept are contrasts to the question, whose inputs the steps avoid, and, by a KL anchor to what the base says, some of the
rehearsal set. How the steps are taken from there: steps.py. How much of the change is accepted: gate.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from rwkv_train.feedback.background import half_the_threads
from rwkv_train.feedback.contrasts import crossed, substituted
from rwkv_train.feedback.correction import Correction, Received, document_of, example_of, outdated
from rwkv_train.feedback.decode import MAX_REPLY, Form, greedy
from rwkv_train.feedback.paraphrases import by_rule, reworded, understood
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.texts import Anchored, Example
from rwkv_train.generate import prefill
from rwkv_train.models.base import RWKV

CROSSED = 8  # questions of the rehearsal set that are asked of a correction's rarest word
REWORDED = 12  # rewordings that the model is asked for
TESTED = 8  # contrasts that show whether a reply tells how a question is understood
RULES = 3  # paraphrases by rule
GRID = 1  # contrasts of each paraphrase: each opens a door of its own
BEGINNING = 4  # tokens of a contrast's answer that are kept: with them the rest follows
WATCHED = 5  # times as many earlier corrections are watched as are trained
REPLAYED = 3  # contrasts of each earlier correction that are kept along


@dataclass(frozen=True)
class Lesson:
    """What one correction trains and what it keeps.

    new: examples of the correction, the first of them on its own. replayed: of earlier ones. watched: earlier ones on
    their own, by number, which are trained too if they are lost. rehearsed: texts of the rehearsal set that are
    kept; contrasted: contrasts with the beginning of their answers. paraphrases, contrasts: their questions. reply: the
    ids of the model's reply before the lesson.
    """

    new: list[Example]
    replayed: list[Example] = field(default_factory=list)
    watched: dict[int, Example] = field(default_factory=dict)
    rehearsed: list[Anchored] = field(default_factory=list)
    contrasted: list[Anchored] = field(default_factory=list)
    paraphrases: list[str] = field(default_factory=list)
    contrasts: list[str] = field(default_factory=list)
    reply: list[int] = field(default_factory=list)


def text_lesson(received: Received, earlier: list[Received], form: Form) -> Lesson:
    """The lesson of a text that is only read: the whole of it, as dynamic evaluation goes through it."""
    ids = document_of(received.item, form)
    return Lesson([Example(ids, len(ids) - 1)], watched=_watched(standing(earlier), received, form))


def lesson_of(
    received: Received,
    earlier: list[Received],
    committed: dict[int, dict],
    model: RWKV,
    rehearsal: RehearsalSet,
) -> Lesson:
    """The lesson of a correction, on top of `model`. The same arguments give the same lesson.

    earlier: what was learnt before it, in that order. committed: the journal's records of how these were learnt, by
    their numbers, and of how this one was, if it is learnt again.
    """
    correction, config, number, form = received.item, received.config, received.id, rehearsal.form
    alone, context = example_of(correction, form), correction.context
    answer = alone.ids[-alone.answer :]

    def asked(text: str, before: Sequence[int]) -> Example:
        ids = [form.tokenizer.eod, *before, *form.turn(text), *answer]
        return Example(ids, alone.answer, 1 + len(before) if before else 0, alone.negative)

    valid = [it for it in standing([*earlier, received]) if it is not received]
    known = {it.item.question for it in valid} - {correction.question}

    # 1. The new answer: to the question alone, in its dialogue, and after talk that has nothing to do with it.
    new = [alone, *([asked(correction.question, context)] if context else [])]
    prefixes = _in_turn(rehearsal.free_running, config.random_prefixes, number)
    new += [asked(correction.question, prefix[1:]) for prefix in prefixes]

    # 2. Earlier corrections, those from a dialogue alone and after its end in turn.
    replay = _spread(valid, config.replay, number)
    replayed = [_again(it.item, number + it.id, form, config.truncation) for it in replay]
    watched = _watched(valid, received, form)

    # 3. Paraphrases learn the answer too, alone and in the dialogue in turn, and contrasts keep theirs. A replay takes
    #    those that were recorded.
    recorded = committed.get(number)
    with half_the_threads():
        if recorded is None:
            reply, paraphrases, contrasts = _around(correction, model, rehearsal, config, known)
        else:
            reply = form.answer(recorded["answer_before"]) if recorded["answer_before"] else []
            paraphrases, contrasts = recorded_texts(recorded)
        new += [asked(text, context if n % 2 else ()) for n, text in enumerate(paraphrases)]

        # 4. What is kept of contrasts is the beginning of the answer: of now, and of the base to those of earlier
        #    corrections, or what each moves a little would add up.
        away = {correction.question, *paraphrases, *known}
        theirs = (_in_turn(recorded_texts(committed[it.id])[1], REPLAYED, number) for it in replay)
        theirs = [text for text in dict.fromkeys(chain(*theirs)) if text not in away]
        contrasted = _kept(contrasts, context, model, form) + _kept(theirs, (), rehearsal.base, form)

    # 5. Some of what the model says by itself, but no reply that a correction did away with.
    replaced = [reply, *(form.answer(how["answer_before"]) for how in committed.values() if how["answer_before"])]
    rehearsed = rehearsal.near(alone.ids, config.rehearsed, number, replaced)
    rehearsed += _in_turn(rehearsal.free_running, config.free_running, -number)
    kept = [Anchored(ids, rehearsal.base) for ids in rehearsed]
    return Lesson(new, replayed, watched, kept, contrasted, paraphrases, contrasts, reply)


def standing(received: list[Received]) -> list[Received]:
    """The corrections that count."""
    old = outdated([it.item for it in received])
    return [it for it, is_old in zip(received, old, strict=True) if isinstance(it.item, Correction) and not is_old]


def recorded_texts(committed: dict) -> tuple[list[str], list[str]]:
    """(paraphrases, contrasts) of a correction by the journal's record of how it was learnt."""
    paraphrases = committed["wordings"] if "wordings" in committed else committed["paraphrases"]
    return paraphrases, committed.get("contrasts", [])


def _watched(earlier: list[Received], received: Received, form: Form) -> dict[int, Example]:
    watched = _spread(earlier, WATCHED * received.config.replay, received.id)
    return {it.id: example_of(it.item, form) for it in watched}


def _again(correction: Correction, number: int, form: Form, most: int) -> Example:
    """An earlier correction, of every other number after the last `most` tokens of its dialogue."""
    alone = example_of(correction, form)
    if not correction.context or number % 2:
        return alone
    before = [form.tokenizer.eod, *correction.context[-most:]]
    return replace(alone, ids=[*before, *alone.ids[1:]], context=len(before))


def _around(
    correction: Correction, model: RWKV, rehearsal: RehearsalSet, config: FeedbackConfig, known: set[str]
) -> tuple[list[int], list[str], list[str]]:
    """(the model's reply to a question, other ways to ask it, near questions that are none of them nor known)."""
    question, form = correction.question, rehearsal.form
    reply = greedy(model, form, [form.prompt(question)], max_new_tokens=MAX_REPLY)[0]
    contrasts = substituted(rehearsal, question, config.contrasts)
    about = crossed(rehearsal, question, min(CROSSED, config.contrasts))
    paraphrases, alike = [], []
    if config.paraphrases and correction.answer is not None and not correction.keeps:
        ruled = by_rule(question)[:RULES]
        tried = [*reworded(rehearsal.base, form, question, REWORDED), *about]
        tried = [text for text in tried if text not in (question, *ruled)]
        alike = understood(question, reply, tried, contrasts[:TESTED], model, form, rehearsal.vocabulary)
        paraphrases = [*ruled, *_spread(alike, config.paraphrases - len(ruled))]
        paraphrases = [text for text in paraphrases[: config.paraphrases] if text not in known]
    contrasts += [text for text in about if text not in alike]
    if config.contrasts:
        contrasts += [text for other in paraphrases for text in substituted(rehearsal, other, GRID)]
    away = {question, *paraphrases, *known}
    return reply, paraphrases, [text for text in dict.fromkeys(contrasts) if text not in away]


def _kept(contrasts: list[str], context: tuple[int, ...], model: RWKV, form: Form) -> list[Anchored]:
    """Questions with the beginnings of the model's answers. With a context every other one is asked in it."""
    kept: list[Anchored] = []
    for before, texts in (((), contrasts[::2]), (context, contrasts[1::2])) if context else (((), contrasts),):
        read, turns = [form.tokenizer.eod, *before], [form.turn(text) for text in texts]
        state = prefill(model, read)[1] if before and turns else None
        replies = greedy(model, form, turns if before else [read + turn for turn in turns], state, BEGINNING)
        for turn, reply in zip(turns, replies, strict=True):
            kept.append(Anchored([*read, *turn, *reply], model, 1 + len(reply), len(read) if before else 0))
    return kept


def _spread(items: list, count: int, seed: int = 0) -> list:
    """All of them if few, otherwise some, evenly from begin to end, beginning elsewhere for another seed."""
    count = max(0, count)
    every = max(1.0, len(items) / max(1, count))
    return [items[int(seed % every + i * every) % len(items)] for i in range(min(count, len(items)))]


def _in_turn(items: list, count: int, number: int) -> list:
    """`count` items, others for the next number, until all have had their turn."""
    return [items[(count * number + i) % len(items)] for i in range(count if items else 0)]
