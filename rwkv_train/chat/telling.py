"""What became of corrections, as a person reads it: outcomes, the history, and labels for the questions they name."""

from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase

from rwkv_train.feedback import Outcome, Reading
from rwkv_train.feedback.correction import item_of
from rwkv_train.feedback.export import Exported
from rwkv_train.feedback.journal import Ledger
from rwkv_train.feedback.lesson import recorded_texts

SHOWN = 6  # questions of a kind that an outcome lists


def told(o: Outcome) -> str:
    """An outcome in a few lines."""
    scaled = f", {o.share:.0%} of the change: more would have moved too much else" if o.share < 1 else ""
    verdict = f"learnt{scaled}" if o.accepted else f"not learnt, nothing was changed: {o.why}"
    if o.accepted and not o.steps:
        verdict = "kept, as it is answered so already"
    lines = [
        f"{o.id}: {verdict} ({o.steps} steps, {o.seconds:.1f} s)",
        f"loss {o.loss_before:.3f} -> {o.loss_after:.3f}, drift elsewhere {o.drift:.4f} nats a token",
    ]
    labels = iter(labelled(o.id, o.paraphrases, o.contrasts))
    for name, questions in (("also asked as", o.paraphrases), ("kept as before", o.contrasts)) if o.accepted else ():
        shown = [f"{label} {text}" for _, (label, text) in zip(questions[:SHOWN], labels, strict=False)]
        if len(questions) > len(shown):
            shown.append(f"{len(questions) - len(shown)} more")
        if shown:
            lines.append(f"{name}: {' | '.join(shown)}")
    if o.note:
        lines.append(o.note)
    if o.answer_after:
        lines += [f"before: {o.answer_before}", f"after:  {o.answer_after}"]
    return "\n".join(lines)


def labelled(number: int, paraphrases: list[str], contrasts: list[str]) -> list[tuple[str, str]]:
    """(label, question) of those that the outcome of a correction shows: 12a, 12b and so on."""
    texts = [*paraphrases[:SHOWN], *contrasts[:SHOWN]]
    return [(f"{number}{letter}", text) for letter, text in zip(ascii_lowercase, texts, strict=False)]


def question_of(ledger: Ledger, label: str) -> str:
    """The question that an outcome showed with a label. Raises ValueError if there is none."""
    number, known = int(label.rstrip(ascii_lowercase)), {}
    how = ledger.committed.get(number)
    if how and how["accepted"]:
        known = dict(labelled(number, *recorded_texts(how)))
    if label not in known:
        raise ValueError(
            f"nothing is labelled {label}; if that is a question, write the number of the correction before it, "
            f"as 12: {label}"
        )
    return known[label]


def history(records: list[dict], ledger: Ledger, marks: dict[int, str]) -> Iterable[str]:
    """A line for each correction or sleep that was not taken back, and below it what belongs to it.

    ledger: of these records. marks: what else there is to say of some, by number.
    """
    theirs: dict[int, list[dict]] = {}
    for record in records:
        if record["kind"] in ("received", "slept") and record["id"] not in ledger.undone:
            belongs = record["kind"] == "received" and record.get("of")
            theirs.setdefault(belongs or record["id"], []).append(record)
    for record in (r for together in theirs.values() for r in together):
        number = record["id"]
        yield _line(ledger.sequence.get(number, record)) + (f" ({marks[number]})" if number in marks else "")


def exported(written: Exported, others: int, waits: int, path: Path) -> str:
    """What was exported, and what was not: corrections that are no chats, and those that still wait."""
    also = f", {written.also} other ways to ask them" if written.also else ""
    kept = f", {written.kept} questions that keep their answer" if written.kept else ""
    text = f"wrote {written.corrections} corrections{also}{kept} to {path}, preferences to {path}.pairs.jsonl"
    if waits:
        text += f"; {waits} that are not learnt yet are not among them"
    if others:
        text += f"; {others} without a right answer (/bad, /learn) are no chats, and not among them"
    if written.replaced:
        text += f"; {written.replaced} whose question has another answer since are not among them"
    if written.alone:
        text += f"; {written.alone} without the dialogue before them, which could not be told from its tokens"
    return text


def _line(record: dict) -> str:
    if record["kind"] == "slept":
        kept = "" if record["accepted"] else f" (not kept: {record['why']})"
        return f"{record['id']}: slept on {len(record['of'])} corrections{kept}"
    item = item_of(record)
    if isinstance(item, Reading):
        return f"{record['id']}: read {' '.join(item.text.split())[:60]} ..."
    if item.of:
        answer = f" => {item.answer}" if item.keeps and item.answer else ""
        return f"  {record['id']}: {'not' if item.keeps else 'also'} {item.question}{answer}"
    return f"{record['id']}: {item.question} => {item.answer or f'anything but: {item.rejected}'}"
