"""The gate: a change is accepted as far as it shows in what is decoded, and leaves all else be."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

from rwkv_train.feedback.background import half_the_threads
from rwkv_train.feedback.correction import Correction, Outcome, Reading, Received
from rwkv_train.feedback.decode import Form, answer_to
from rwkv_train.feedback.lesson import Lesson
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.snapshots import weights_hash
from rwkv_train.feedback.steps import Diverged
from rwkv_train.feedback.texts import Example, answer_loss, wrong
from rwkv_train.feedback.trainable import between, changed
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import NotFinite

SHARES = (1.0, 0.75, 0.5)  # of a change, tried in turn when the whole of it moves everything else too far
SHORT = 200  # characters of an answer that are told


@dataclass(frozen=True)
class Verdict:
    """Whether a change was accepted; why not, as far as it was not.

    model: with the accepted share of the change. drift: of the last one that was tried, in nats a token. answer: of
    `model` to the question, as decoded.
    """

    accepted: bool
    model: RWKV
    share: float
    drift: float
    why: str
    answer: str


def gate(
    item: Correction | Reading, before: RWKV, whole: RWKV, answer_before: str, rehearsal: RehearsalSet, max_kl: float
) -> Verdict:
    """How much of the way from `before` to `whole` is accepted. Raises NotFinite if a model gives no finite number.

    max_kl: largest drift on the rehearsal set, in nats a token.
    """
    why, answer = "", answer_before
    with half_the_threads():
        for share in SHARES:
            after = whole if share == 1 else between(before, whole, share)
            drift = rehearsal.drift(before, after)
            if isinstance(item, Correction):
                answer = answer_to(after, rehearsal.form, item.question, taught=item.answer)
                if not shows(item, answer, rehearsal.form):
                    why = why or _still_given(answer, item)
                    break
            if drift <= max_kl:
                return Verdict(True, after, share, drift, "", answer)
            why = f"everything else would drift by {drift:.3g} nats a token, over max_kl, {max_kl}"
    return Verdict(False, before, 0.0, drift, why, answer_before)


def _still_given(answer: str, item: Correction) -> str:
    if len(answer) <= SHORT or item.answer is None:
        return f"decoding still gives {answer[:SHORT]!r}"
    alike = sum(takewhile(bool, map(eq, answer, item.answer)))
    return f"decoding still gives another answer from its character {alike + 1:,} on: {answer[alike:][:SHORT]!r}"


def told_of_dialogue(item: Correction | Reading, model: RWKV, form: Form) -> str:
    """That a correction does not show in the dialogue it was made in, as a note; "" if it does, or there is none."""
    if isinstance(item, Reading) or not item.context:
        return ""
    with half_the_threads():
        answer = answer_to(model, form, item.question, item.context, item.answer)
    return "" if shows(item, answer, form) else f"in its dialogue {_still_given(answer, item)}; /fix it there again"


def told_of_lost(watched: dict[int, Example], model: RWKV) -> str:
    """Which earlier corrections a model does not give as they were taught, as a note; "" if there are none."""
    with half_the_threads():
        lost = wrong(model, list(watched.values()))
    numbers = [str(number) for number, example in watched.items() if example in lost]
    return f"no longer right: {', '.join(numbers)}; /sleep learns all together" if numbers else ""


def judge(
    received: Received, before: RWKV, lesson: Lesson, learn: Callable[[], tuple[RWKV, int]], rehearsal: RehearsalSet
) -> tuple[Outcome, RWKV]:
    """What becomes of a lesson on top of a model, and the model it leaves; learn() -> (one that took it, steps)."""
    answer_before, steps = rehearsal.form.shown(lesson.reply), 0
    try:
        whole, steps = learn()
        verdict = gate(received.item, before, whole, answer_before, rehearsal, received.config.max_kl)
    except Diverged as error:
        verdict = Verdict(False, before, 0.0, 0.0, str(error), answer_before)
    except NotFinite:
        why = "the steps left numbers that are not finite; a smaller step_factor may help"
        steps, verdict = 0, Verdict(False, before, 0.0, 0.0, why, answer_before)
    taught = isinstance(received.item, Correction)
    seen_to = taught and verdict.share == 1 and steps < received.config.steps  # the steps went on until none was lost
    note = told_of_lost(lesson.watched, verdict.model) if verdict.accepted and not seen_to else ""
    with half_the_threads():
        losses = [answer_loss(model, lesson.new[0]) for model in (before, verdict.model)]
    outcome = Outcome(
        id=received.id,
        accepted=verdict.accepted,
        why="learnt" if verdict.accepted else verdict.why,
        loss_before=losses[0],
        loss_after=losses[1],
        answer_before=answer_before,
        answer_after=verdict.answer,
        steps=steps,
        share=verdict.share,
        paraphrases=lesson.paraphrases,
        contrasts=lesson.contrasts,
        drift=verdict.drift,
        seconds=0.0,
        weights=weights_hash(changed(verdict.model, rehearsal.base)),
        note=note,
    )
    return outcome, verdict.model


def shows(correction: Correction, answer: str, form: Form) -> bool:
    """Whether a decoded answer is the right one, or not the wrong one."""
    if correction.answer is None:
        return answer != form.shown(form.answer(correction.rejected))
    return answer == form.shown(form.answer(correction.answer))
