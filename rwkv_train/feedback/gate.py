"""The gate: a change is accepted as far as it shows in what is decoded, and leaves all else be."""

from dataclasses import dataclass

from rwkv_train.feedback.background import half_the_threads
from rwkv_train.feedback.correction import Correction, Reading
from rwkv_train.feedback.decode import Form, answer_to
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.trainable import between
from rwkv_train.models.base import RWKV

SHARES = (1.0, 0.75, 0.5)  # of a change, tried in turn when the whole of it moves everything else too far


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
                    why = why or f"decoding still gives {answer!r}"
                    break
            if drift <= max_kl:
                return Verdict(True, after, share, drift, "", answer)
            why = f"everything else would drift by {drift:.3g} nats a token, over max_kl, {max_kl}"
    return Verdict(False, before, 0.0, drift, why, answer_before)


def told_of_dialogue(item: Correction | Reading, model: RWKV, form: Form) -> str:
    """That a correction does not show in the dialogue it was made in, as a note; "" if it does, or there is none."""
    if isinstance(item, Reading) or not item.context:
        return ""
    with half_the_threads():
        answer = answer_to(model, form, item.question, item.context, item.answer)
    return "" if shows(item, answer, form) else f"in its dialogue decoding still gives {answer!r}; /fix it there again"


def shows(correction: Correction, answer: str, form: Form) -> bool:
    """Whether a decoded answer is the right one, or not the wrong one."""
    if correction.answer is None:
        return answer != form.shown(form.answer(correction.rejected))
    return answer == form.shown(form.answer(correction.answer))
