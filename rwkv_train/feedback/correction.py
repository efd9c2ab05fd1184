"""What a profile can be asked to learn, what became of it, and the tokens it is read as."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rwkv_train.feedback.decode import MAX_REPLY, Form
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.texts import Example

LONGEST = {"question": 2000, "answer": 2000, "text": 1_000_000}  # characters


@dataclass(frozen=True)
class Correction:
    """What the model should have answered.

    question: the user's message; answer: the right reply, None if it is only known that `rejected` is wrong.
    context: ids of the dialogue before the question. rejected: the wrong reply, if there was one.
    of: the number of the correction that this one belongs to, as another way to ask it or, if it `keeps`, as a question
    that keeps the answer it had before that one; then the answer is found when it is its turn.
    """

    question: str
    answer: str | None
    context: tuple[int, ...] = field(default=(), repr=False)
    rejected: str | None = None
    of: int | None = None
    keeps: bool = False


@dataclass(frozen=True)
class Reading:
    """A text that the model should get used to, gently."""

    text: str


@dataclass(frozen=True)
class Received:
    """What the journal has of a correction: its number, what is to be learnt, and the settings it came with."""

    id: int
    item: Correction | Reading
    settings: dict

    @property
    def config(self) -> FeedbackConfig:
        return FeedbackConfig(**self.settings)


@dataclass(frozen=True)
class Outcome:
    """What became of a correction.

    why: what spoke against it, or "learnt". Losses in nats a token; answers as decoded, to the question on its own.
    share: of the change that was kept, below 1 where all of it would have moved everything else too far.
    paraphrases: other ways to ask, taught along. contrasts: near questions whose answers were kept. drift: KL of the
    model before from the model after, in nats a token of the rehearsal set. weights: hash of the weights that are not
    the base's. note: what else a person should know about it.
    """

    id: int
    accepted: bool
    why: str
    loss_before: float
    loss_after: float
    answer_before: str
    answer_after: str
    steps: int
    share: float
    paraphrases: list[str]
    contrasts: list[str]
    drift: float
    seconds: float
    weights: str
    note: str = ""


def item_of(record: dict) -> Correction | Reading:
    """What a journal's record says is to be learnt."""
    if "text" in record:
        return Reading(record["text"])
    belongs = record.get("of"), record.get("keeps", False)
    return Correction(record["question"], record["answer"], tuple(record["context"]), record["rejected"], *belongs)


def received_of(record: dict) -> Received:
    """A journal's record of a correction."""
    return Received(record["id"], item_of(record), record["config"])


def outdated(items: Sequence[Correction | Reading]) -> list[bool]:
    """Of each, in their order, whether it no longer counts. Of several answers to one question the last does.

    That a reply is wrong does away with that answer alone, and needs no saying once another one is taught.
    """
    old, answered, wrong = [], set(), defaultdict(set)
    for item in reversed(items):
        if isinstance(item, Reading):
            old.append(False)
            continue
        said = item.rejected if item.answer is None else item.answer
        old.append(item.question in answered or said in wrong[item.question])
        if item.answer is None:
            wrong[item.question].add(said)
        else:
            answered.add(item.question)
    return old[::-1]


def check(item: Correction | Reading, form: Form) -> None:
    """Raises ValueError for what cannot be learnt."""
    if isinstance(item, Reading):
        document_of(item, form)
    elif item.keeps:
        _check("question", item.question)
    else:
        example_of(item, form)


def example_of(correction: Correction, form: Form) -> Example:
    """A correction without its context. ValueError if it cannot be learnt."""
    negative = correction.answer is None
    if negative and correction.rejected is None:
        raise ValueError("there is neither a right answer nor a wrong one; give one of them")
    text = correction.rejected if negative else correction.answer
    for name, given in (("question", correction.question), ("answer", text)):
        _check(name, given)
    answer = form.taught(text)
    if correction.keeps:
        answer = answer[:MAX_REPLY]  # a longer reply had no end
    return Example([*form.prompt(correction.question), *answer], len(answer), negative=negative)


def document_of(reading: Reading, form: Form) -> list[int]:
    """A text as a document. ValueError if it cannot be learnt."""
    _check("text", reading.text)
    return [form.tokenizer.eod, *form.tokenizer.encode(reading.text)]


def _check(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"the {name} is empty; say what the model should learn")
    if len(text) > LONGEST[name]:
        raise ValueError(f"the {name} has {len(text):,} characters, more than {LONGEST[name]:,}; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is not valid Unicode ({error.reason}); type it again") from None
