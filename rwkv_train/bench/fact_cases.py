"""False facts to be learnt by a model that knows the true ones (corpus:facts), and what must not change meanwhile."""

import random
import re
from collections import Counter
from itertools import islice

from rwkv_train.bench.correction_cases import Case
from rwkv_train.data.corpora.catalogue import read_corpus
from rwkv_train.data.corpora.facts import Fact, facts
from rwkv_train.data.templates import Template

TAUGHT = ("capital", "language", "currency")
LONE_QUESTION = re.compile(r"[^.!?\n]{24,59}\?")  # long enough to be nobody else's


def fact_cases(seed: int = 0) -> list[Case]:
    """One case a country: a fact with the value of another country, asked as in training.

    Paraphrases are questions that the corpus never asks; neighbours ask the same of two other countries, and
    same_subject asks something else of the same one. None of those is itself corrected by another case.
    """
    rng = random.Random(seed)
    by_country: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts():
        by_country.setdefault((fact.country, fact.relation.language), []).append(fact)
    chosen = []
    for country in sorted({country for country, _ in by_country}):
        language = rng.choice([code for c, code in by_country if c == country])
        if known := [f for f in by_country[country, language] if f.relation.name in TAUGHT]:
            chosen.append(rng.choice(known))
    left = [f for f in facts() if f not in chosen]
    return [_case(fact, left, rng) for fact in chosen]


def _case(fact: Fact, left: list[Fact], rng: random.Random) -> Case:
    same_relation = [f for f in left if f.relation is fact.relation]
    others = sorted({f.value for f in same_relation if f.value != fact.value})
    answer = fact.relation.answer.format(fact.subject, rng.choice(others))
    neighbours = rng.sample(same_relation, min(2, len(same_relation)))
    same = [f for f in left if f.country == fact.country and f.relation.language == fact.relation.language]
    return Case(
        fact.questions()[0],
        answer,
        fact.questions(unseen=True),
        [f.questions()[0] for f in neighbours],
        [f.questions()[0] for f in same],
        language=fact.relation.language,
    )


def small_talk(count: int = 200) -> list[str]:
    """Questions that have nothing to do with the cases, and one answer each in what the starter model has read."""
    asked = Counter(chat["messages"][0]["content"] for _, chat in read_corpus("chatterbot"))
    short = sorted(q for q, times in asked.items() if times == 1 and 10 <= len(q) <= 60)
    return short[:: max(1, len(short) // count)][:count]


def strangers_questions(skip: int = 460, count: int = 200) -> list[str]:
    """Questions out of talks that the starter model has not read, behind those of strangers_talk."""
    said = (m["content"].strip() for _, chat in islice(read_corpus("chitchat"), skip, None) for m in chat["messages"])
    return list(islice(dict.fromkeys(text for text in said if LONE_QUESTION.fullmatch(text)), count))


def strangers_talk(skip: int = 400, count: int = 60) -> list[list[tuple[str, bool]]]:
    """Talks that the starter model has not read (it has read the first `skip`), as (text, whether it was spoken)."""
    template = Template(train_roles=["user", "assistant"])
    talks = [chat["messages"] for _, chat in read_corpus(f"chitchat/{skip + count}")][skip:]
    return [template.segments(messages) for messages in talks]
