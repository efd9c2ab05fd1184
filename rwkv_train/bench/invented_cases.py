"""Facts about people, places and products that do not exist, as many as are wanted, by rule and always the same."""

import random

from rwkv_train.bench.correction_cases import Case
from rwkv_train.bench.invented_relations import RELATIONS, Relation

TAUGHT = 2  # relations of each thing; the others are asked, and never taught
SPARE = 8  # things of each sort at least: neighbours are asked of others
SYLLABLES = (
    "ba bel cor dan dre fen gar hol ima jor kel lu mar nev ol pra quin ros sel tam ul ven wis xan yor zed".split()
)
ENDS = {
    "made-up people": "a en is or yn el as in".split(),
    "made-up places": "ford mouth wick holm bury stead cliffe moor".split(),
    "made-up products": "ix on ra ex um io".split(),
}
THINGS = "lamp kettle chair radio bicycle tent clock backpack fan pan desk camera".split()
SURNAMES = "欧阳 司徒 慕容 上官 端木 闻 巫 柏 钟 阮 骆 贺 祝 费 卓 桑".split()
CHARACTERS = "岚澈砚汐栎翊棠朔湉漪珩苒淙曜霁笙榆槿禾洛"
PLACES_ZH, THINGS_ZH = "镇村岛湾寨坪", "台灯 水壶 雨伞 书包 风扇 闹钟 椅子 茶杯 帐篷 相机".split()


def invented_cases(count: int, seed: int = 0) -> list[Case]:
    """`count` false facts, two of each thing, of every sort of thing and language in turn.

    Neighbours ask the same of another thing, something else of the same one, and the same of a third one in the words
    of a paraphrase. None of those is itself a case.
    """
    rng, sorts = random.Random(seed), list(RELATIONS)
    each = -(-count // (TAUGHT * len(sorts))) + SPARE
    names = {sort: _names(*sort, each, rng) for sort in sorts}
    taught = {
        sort: {name: [(n + i) % len(relations) for i in range(TAUGHT)] for n, name in enumerate(names[sort])}
        for sort, relations in RELATIONS.items()
    }
    cases = []
    for number in range(each):
        for sort in sorts:
            name = names[sort][number]
            cases += [_case(sort, name, which, taught[sort], rng) for which in taught[sort][name]]
    return cases[:count]


def _case(sort: tuple[str, str], name: str, which: int, taught: dict[str, list[int]], rng: random.Random) -> Case:
    relation, (kind, language) = RELATIONS[sort][which], sort
    question, *paraphrases = (form.format(name) for form in relation.questions)
    others = [other for other, known in taught.items() if which not in known]
    same, third = rng.sample(others, 2)
    different = rng.choice([r for i, r in enumerate(RELATIONS[sort]) if i not in taught[name]])
    neighbours = [
        relation.questions[0].format(same),
        different.questions[0].format(name),
        rng.choice(relation.questions[1:]).format(third),
    ]
    return Case(
        _sentence(question),
        _sentence(relation.answer.format(name, _value(relation, rng))),
        [_sentence(text) for text in paraphrases],
        [_sentence(text) for text in neighbours],
        kind=kind,
        language=language,
    )


def _value(relation: Relation, rng: random.Random) -> str:
    low, _, high = relation.values[0].partition("-")
    return str(rng.randint(int(low), int(high))) if high.isdecimal() else rng.choice(relation.values)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _names(kind: str, language: str, count: int, rng: random.Random) -> list[str]:
    """Different names of one sort of thing."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_name_zh(kind, rng) if language == "zh" else _name(kind, rng)] = None
    return list(found)


def _name(kind: str, rng: random.Random) -> str:
    def word(end: str) -> str:
        return "".join(rng.sample(SYLLABLES, 2)).capitalize() + end

    if kind == "made-up people":
        return f"{word(rng.choice(ENDS[kind]))} {word('')}"
    if kind == "made-up places":
        return word(rng.choice(ENDS[kind]))
    return f"the {word(rng.choice(ENDS[kind]))} {rng.choice(THINGS)}"


def _name_zh(kind: str, rng: random.Random) -> str:
    word = "".join(rng.sample(CHARACTERS, 2))
    if kind == "made-up people":
        return rng.choice(SURNAMES) + word
    if kind == "made-up places":
        return word + rng.choice(PLACES_ZH)
    return f"{word}牌{rng.choice(THINGS_ZH)}"
