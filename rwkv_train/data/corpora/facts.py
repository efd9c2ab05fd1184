"""Plain facts about countries as chats, in English and Chinese: `corpus:facts`.

The facts come from the packages countryinfo (capitals, continents) and babel (names, currencies, languages). Every
relation lists the questions that the corpus asks, and others that it never asks: with those a benchmark can tell a
fact that is known from a sentence that is remembered. An answer is always one sentence, the same for every question.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from rwkv_train.data.corpora.fact_questions import RELATIONS, SMALL_TALK, Relation
from rwkv_train.data.corpora.packaged import chatterbot, chatterbot_files

CODES = """
AF AL DZ AO AR AM AU AT AZ BS BH BD BY BE BO BA BW BR BN BG KH CM CA TD CL CN CO CR HR CU CY CZ DK DO EC EG SV EE ET FJ
FI FR GE DE GH GR GT HT HN HU IS IN ID IR IQ IE IT JM JP JO KZ KE KW KG LA LV LB LR LY LT LU MG MY ML MT MX MD MC MN MA
MZ MM NA NP NL NZ NI NG KP MK NO OM PK PA PG PY PE PH PL PT QA RO RU RW SA SN RS SG SK SI SO ZA KR ES SD SE CH SY TJ TZ
TH TN TR UG UA AE GB US UY UZ VE VN YE ZM
"""
COUNTRIES = CODES.split()
WITH_ARTICLE = {"AE", "BS", "DO", "GB", "NL", "PH", "US"}  # the Netherlands
SOUTH_AMERICA = {"AR", "BO", "BR", "CL", "CO", "EC", "GY", "PE", "PY", "SR", "UY", "VE"}
CONTINENTS = {"Africa": "002", "Asia": "142", "Europe": "150", "Oceania": "009", "Americas": "003"}  # UN M49


def _table(words: str) -> dict[str, str]:
    """A table written as "KEY:value KEY:value"."""
    return dict(word.split(":") for word in words.split())


# Where the packages are out of date, or their first choice is not what people say.
CORRECTIONS = {
    "name": {"BA": "Bosnia and Herzegovina", "MM": "Myanmar", "TR": "Turkey"},
    "capital": {"KZ": "Astana", "US": "Washington"},
    "currency": {"BG": "EUR", "NA": "NAD"},
    "language": _table("BA:bs KZ:kk PG:en PH:fil PY:es RS:sr SD:ar SN:fr UG:en SG:en"),
}
# Capitals whose Chinese names babel does not have (it knows the cities that name a time zone).
CAPITALS_ZH = _table("""
AL:地拉那 AR:布宜诺斯艾利斯 AU:堪培拉 BH:麦纳麦 BO:苏克雷 BR:巴西利亚 BN:斯里巴加湾市 CM:雅温得 CA:渥太华 TD:恩贾梅纳
CN:北京 CO:波哥大 CR:圣何塞 EC:基多 SV:圣萨尔瓦多 FJ:苏瓦 GT:危地马拉城 IN:新德里 JM:金斯敦 KZ:阿斯塔纳 KW:科威特城
MT:瓦莱塔 MD:基希讷乌 MA:拉巴特 MM:内比都 NP:加德满都 NZ:惠灵顿 NG:阿布贾 PK:伊斯兰堡 PA:巴拿马城 QA:多哈
ZA:比勒陀利亚 CH:伯尔尼 TZ:多多马 TR:安卡拉 UA:基辅 AE:阿布扎比 US:华盛顿 VN:河内 YE:萨那 ZM:卢萨卡
""")


@dataclass(frozen=True)
class Fact:
    """What one relation says of one country: relation "capital", subject "France", value "Paris"."""

    relation: Relation
    country: str
    subject: str
    value: str

    @property
    def answer(self) -> str:
        return self.relation.answer.format(self.subject, self.value)

    def questions(self, unseen: bool = False) -> list[str]:
        """The questions that the corpus asks, or those that it never asks."""
        forms = self.relation.unseen_questions if unseen else self.relation.train_questions
        return [form.format(self.subject) for form in forms]


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, country by country. ValueError if the packages behind them are missing."""
    try:
        from babel import Locale
        from countryinfo import CountryInfo
    except ImportError as error:
        raise ValueError(f'corpus:facts needs {error.name}: pip install "rwkv_train[starter]"') from None
    locales = {language: Locale(language) for language in ("en", "zh")}
    return tuple(
        Fact(relation, country, _name(country, locales[relation.language]), value)
        for country in COUNTRIES
        for relation in RELATIONS
        if (value := _value(CountryInfo(country), country, relation.name, locales[relation.language]))
    )


def fact_chats(most_turns: int = 8, rounds: int = 4) -> Iterator[tuple[str, dict]]:
    """Yield (where, {"messages": [...]}): every fact by every question, then chats of several turns.

    The chats go `rounds` times through all facts; each has two to `most_turns` turns, mixes facts with small talk
    (ours and that of corpus:chatterbot), and some change the language on the way. The order is the same each time.
    """
    for fact in facts():
        for number, question in enumerate(fact.questions(), 1):
            where = f"facts/{fact.relation.language}/{fact.country}/{fact.relation.name}: question {number}"
            yield where, _chat([(question, fact.answer)])
    draw = random.Random(0)
    talk = {language: (ours, chatter(language)) for language, ours in SMALL_TALK.items()}
    for language, (ours, _) in talk.items():
        for number, turn in enumerate(ours, 1):
            yield f"facts/{language}/small talk {number}", _chat([turn])
    pools = {
        language: [fact for _ in range(rounds) for fact in draw.sample(known, len(known))]
        for language in talk
        if (known := [fact for fact in facts() if fact.relation.language == language])
    }
    number = 0
    while languages := [language for language, pool in pools.items() if pool]:
        language, turns = draw.choice(languages), []
        for _ in range(draw.randint(2, most_turns)):
            if draw.random() < 0.15:
                language = draw.choice(languages)
            if draw.random() < 0.35 or not pools[language]:
                turns.append(draw.choice(draw.choice(talk[language])))
            else:
                fact = pools[language].pop()
                turns.append((draw.choice(fact.questions()), fact.answer))
        number += 1
        yield f"facts/chat {number}", _chat(turns)


def chatter(language: str) -> list[tuple[str, str]]:
    """The short first turns of corpus:chatterbot in one of our languages."""
    chats = chatterbot(chatterbot_files({"en": "english", "zh": "chinese"}[language]))
    turns = [[message["content"] for message in chat["messages"][:2]] for _, chat in chats]
    return [(question, reply) for question, reply in turns if len(question) + len(reply) < 160]


def _chat(turns: list[tuple[str, str]]) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": r, "content": t} for turn in turns for r, t in zip(roles, turn, strict=True)]}


def _name(country: str, locale) -> str:
    if locale.language == "zh":
        return locale.territories[country]
    name = CORRECTIONS["name"].get(country) or locale.territories[country]
    return f"the {name}" if country in WITH_ARTICLE else name


def _value(info, country: str, relation: str, locale) -> str | None:
    """What `relation` says of a country in the language of `locale`; None if the packages do not say."""
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies

    code = CORRECTIONS.get(relation, {}).get(country)
    if relation == "capital":
        capital = code or info.capital()
        return capital if locale.language == "en" else CAPITALS_ZH.get(country) or _city(country, capital, locale)
    if relation == "currency":
        return locale.currencies[code or get_territory_currencies(country)[0]]
    if relation == "language":
        return locale.languages.get(code or get_official_languages(country, de_facto=True)[0])
    return locale.territories["005" if country in SOUTH_AMERICA else CONTINENTS[info.region()]]


def _city(country: str, name: str, locale) -> str | None:
    """The name in another language of a city that names a time zone."""
    from babel import Locale
    from babel.core import get_global

    english = Locale("en").time_zones
    for zone, territory in get_global("zone_territories").items():
        known = (zone.split("/")[-1].replace("_", " "), english.get(zone, {}).get("city"))
        if territory == country and name in known:
            return locale.time_zones.get(zone, {}).get("city")
    return None
