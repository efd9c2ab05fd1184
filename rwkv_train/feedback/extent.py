"""How far a correction goes, as a person says it: other ways to ask it, and questions that keep their answer.

Both are corrections themselves, and belong to the one they speak of: they are learnt after it and undone with it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from rwkv_train.feedback.background import half_the_threads
from rwkv_train.feedback.correction import Correction, Reading, Received, item_of, outdated
from rwkv_train.feedback.decode import Form, answer_to
from rwkv_train.feedback.journal import Journal
from rwkv_train.models.base import RWKV


def another_wording(journal: Journal, text: str, of: int | None = None) -> Correction:
    """Another way to ask a correction; of: its number, or None for the newest. Raises ValueError if it cannot be."""
    record = _meant(journal, of)
    number = record["id"]
    if of is not None and journal.records[of - 1].get("keeps"):
        raise ValueError(f"{of} keeps an answer and is asked in no other way; name correction {number} itself")
    if record["answer"] is None:
        raise ValueError(f"correction {number} has only a wrong answer; there is no right one to ask for otherwise")
    check_differs(text, record["question"])
    return Correction(text, record["answer"], tuple(record["context"]), of=number)


def kept_question(journal: Journal, text: str, of: int | None = None) -> Correction:
    """A question that keeps the answer it had before a correction; of: as above. Raises ValueError if it cannot be."""
    record = _meant(journal, of)
    check_differs(text, record["question"])
    return Correction(text, None, tuple(record["context"]), of=record["id"], keeps=True)


def belonging(records: list[dict], ids: Iterable[int]) -> list[int]:
    """The numbers, among these records, of what belongs to some corrections and is not among them."""
    ids = set(ids)
    return [r["id"] for r in records if r.get("of") in ids and r["id"] not in ids]


def settled(
    received: Received, known: list[dict], rebuilt: Callable[[list[dict]], RWKV], form: Form
) -> tuple[Received, str]:
    """(a correction as it is learnt now that it is its turn, a note on it).

    A question that keeps its answer is given one: what another correction taught, or else what the model before the
    one it belongs to says. known: records of what is learnt; rebuilt(records): the model that follows from them.
    Raises ValueError if it belongs to one that is not learnt, or had no answer.
    """
    item, numbers = received.item, [record["id"] for record in known]
    if isinstance(item, Reading):
        return received, ""
    if item.of not in (None, *numbers):
        raise ValueError(f"correction {item.of}, to which it belongs, is not learnt")
    if not item.keeps:
        return received, "; ".join(filter(None, [_replaced(item, known), _shortened(item, form)]))
    if other := _taught(item.question, [r for r in known if item.of not in (r["id"], r.get("of"))]):
        item = replace(item, answer=other["answer"], context=())
        return replace(received, item=item), f"its answer is that of correction {other['id']}"
    before = rebuilt(known[: numbers.index(item.of)])
    with half_the_threads():
        answer = answer_to(before, form, item.question)
        alike = not item.context or answer_to(before, form, item.question, item.context) == answer
    if not answer:
        raise ValueError("the model had no answer to it that could be kept")
    note = "" if alike else "in the dialogue before the correction it had another answer, which is not kept"
    return replace(received, item=replace(item, answer=answer, context=item.context if alike else ())), note


def _replaced(item: Correction, known: list[dict]) -> str:
    """Which correction of the same question no longer counts, as a note; "" if there is none."""
    last = _taught(item.question, known)
    if last is None or last["answer"] == item.answer or (item.answer is None and last["answer"] != item.rejected):
        return ""
    note = f"in place of correction {last['id']}: of answers to one question the last counts, in any dialogue"
    others = [r for r in known if r.get("of") == last["id"] and not r.get("keeps") and r["answer"] == last["answer"]]
    asked = ", ".join(repr(r["question"]) for r in others if _taught(r["question"], known) is r)
    return f"{note}; asked as {asked}, it keeps the answer of before, unless you say /also again" if asked else note


def _taught(question: str, known: list[dict]) -> dict | None:
    """The record of the answer that counts to a question."""
    about = [r for r in known if r.get("question") == question]
    old = outdated([item_of(r) for r in about])
    return next((r for r, is_old in zip(about, old, strict=True) if not is_old and r["answer"] is not None), None)


def _shortened(item: Correction, form: Form) -> str:
    """That an answer is learnt without some of its lines, as a note; "" if it is not."""
    given = (item.answer or "").replace("\r\n", "\n").strip()
    if form.template.clean(given, "assistant").strip() == given:
        return ""
    return "its blank lines are left out: a blank line ends a message of this model's"


def is_kept(item: Correction, model: RWKV, form: Form) -> bool:
    """Whether a model gives a question the answer that it keeps, also in its dialogue."""
    wanted = form.shown(form.answer(item.answer))
    contexts = dict.fromkeys([(), item.context])
    with half_the_threads():
        return all(answer_to(model, form, item.question, context) == wanted for context in contexts)


def _meant(journal: Journal, of: int | None) -> dict:
    """The record of the correction that is meant by a number, or by none; what belongs to another one means that."""
    ledger = journal.ledger
    received = {r["id"]: r for r in journal.records if r["kind"] == "received" and r["id"] not in ledger.undone}
    if of is None:
        of = max((number for number, r in received.items() if "question" in r), default=None)
    if of is None:
        raise ValueError("nothing was corrected yet")
    if of not in received:
        raise ValueError(f"no active correction has the number {of}; see the history")
    number = received[of].get("of") or of
    how = ledger.committed.get(number)
    if how and not how["accepted"]:
        why = f"correction {number} was not learnt ({how['why']})"
        raise ValueError(f"{why}; say which other one is meant, by its number")
    if "question" not in received[number]:
        raise ValueError(f"{number} is a text that was read; only a correction can be asked otherwise")
    return received[number]


def check_differs(text: str, question: str) -> None:
    """Raises ValueError for a text that is the corrected question itself."""
    if text.strip() == question.strip():
        raise ValueError(f"{text!r} is the corrected question itself; give another one")
