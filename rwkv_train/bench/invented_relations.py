"""What can be asked about people, places and products that do not exist, for invented_cases.py. Our own text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """What is asked about one sort of thing, in one language.

    values: words, or "1900-1999" for a number. questions: with {} for the thing, the first one to be taught, the
    others paraphrases of it. answer: with {} for the thing and {} for the value.
    """

    values: tuple[str, ...]
    answer: str
    questions: tuple[str, str, str, str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


RELATIONS = {
    ("made-up people", "en"): (
        Relation(
            _words("baker, pilot, nurse, carpenter, lawyer, gardener, tailor, plumber, painter, judge, sailor, miner"),
            "{} works as a {}.",
            (
                "What does {} do for a living?",
                "What is {}'s job?",
                "Tell me the profession of {}.",
                "How does {} earn money?",
            ),
        ),
        Relation(
            _words("violin, trumpet, drums, harp, cello, flute, accordion, banjo, oboe, organ, guitar, tuba"),
            "{} plays the {}.",
            (
                "Which instrument does {} play?",
                "What does {} play in the band?",
                "Tell me what instrument {} plays.",
                "On which instrument can one hear {}?",
            ),
        ),
        Relation(
            _words(
                "mushroom soup, fried rice, plum cake, lentil stew, pancakes, fish pie, dumplings, apple pie, goulash"
            ),
            "The favourite dish of {} is {}.",
            (
                "What is the favourite dish of {}?",
                "What does {} like to eat most?",
                "Which food does {} love best?",
                "What should I cook for {}?",
            ),
        ),
        Relation(
            ("1931-1999",),
            "{} was born in {}.",
            (
                "When was {} born?",
                "In which year was {} born?",
                "What is the year of birth of {}?",
                "Tell me when {} came into the world.",
            ),
        ),
        Relation(
            _words("spiders, heights, thunder, dogs, deep water, the dark, lifts, needles, mice, crowds, flying"),
            "{} is afraid of {}.",
            (
                "What is {} afraid of?",
                "What scares {}?",
                "Which fear does {} have?",
                "Tell me what frightens {}.",
            ),
        ),
    ),
    ("made-up places", "en"): (
        Relation(
            ("1105-1895",),
            "{} was founded in {}.",
            (
                "When was {} founded?",
                "In what year did {} begin?",
                "Since when has {} been there?",
                "Tell me the founding year of {}.",
            ),
        ),
        Relation(
            _words("Ossel, Brent, Tarn, Wolde, Imber, Lunt, Sarre, Keld, Noor, Yarrel, Ebbe, Quill"),
            "The river {1} flows through {0}.",
            (
                "Which river flows through {}?",
                "What is the river of {} called?",
                "On which river does {} lie?",
                "Name the river in {}.",
            ),
        ),
        Relation(
            _words("cheese, carpets, clocks, glass, honey, salt, pottery, roses, knives, beer, paper, bells"),
            "{} is known for its {}.",
            (
                "What is {} known for?",
                "What made {} famous?",
                "What do people buy in {}?",
                "For what does everybody know {}?",
            ),
        ),
        Relation(
            ("2100-98700",),
            "{} has {} inhabitants.",
            (
                "How many people live in {}?",
                "What is the population of {}?",
                "How many inhabitants has {}?",
                "How big is {}, in people?",
            ),
        ),
        Relation(
            _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
            "The market in {} is on {}.",
            (
                "On which day is the market in {}?",
                "When is market day in {}?",
                "What day do they hold the market in {}?",
                "When can I go to the market of {}?",
            ),
        ),
    ),
    ("made-up products", "en"): (
        Relation(
            ("12-940",),
            "{} costs {} dollars.",
            (
                "How much is {}?",
                "What does {} cost?",
                "What is the price of {}?",
                "How many dollars do I pay for {}?",
            ),
        ),
        Relation(
            _words("beech, copper, bamboo, glass, steel, cork, leather, clay, felt, brass, linen, walnut"),
            "{} is made of {}.",
            (
                "What is {} made of?",
                "Which material is {} made from?",
                "Tell me the material of {}.",
                "Out of what do they build {}?",
            ),
        ),
        Relation(
            _words("Arbo, Teckel, Mirando, Folk & Sons, Nivell, Orlik, Haddo, Pettersen, Zumm, Calder, Umbra, Rossi"),
            "{} comes from {}.",
            (
                "Who makes {}?",
                "Which company makes {}?",
                "From which firm does {} come?",
                "Who is the maker of {}?",
            ),
        ),
        Relation(
            _words("one year, two years, three years, four years, five years, six months, ten years, thirty days"),
            "The warranty of {} lasts {}.",
            (
                "How long is the warranty of {}?",
                "How long does the guarantee of {} last?",
                "For how long is {} under warranty?",
                "What guarantee do I get on {}?",
            ),
        ),
        Relation(
            _words("red, green, orange, silver, purple, white, yellow, pink, brown, turquoise, grey, black"),
            "{} is only sold in {}.",
            (
                "Which colour does {} come in?",
                "What colour is {}?",
                "In which colour can I buy {}?",
                "Tell me the colour of {}.",
            ),
        ),
    ),
    ("made-up people", "zh"): (
        Relation(
            tuple("木匠 护士 律师 司机 厨师 裁缝 渔夫 画家 邮差 园丁 会计 法官".split()),
            "{}是一名{}。",
            ("{}是做什么工作的？", "{}的职业是什么？", "你知道{}靠什么谋生吗？", "{}从事哪一行？"),
        ),
        Relation(
            tuple("二胡 古筝 小提琴 笛子 吉他 鼓 琵琶 口琴 大提琴 钢琴".split()),
            "{}会演奏{}。",
            ("{}会什么乐器？", "{}演奏哪种乐器？", "在乐队里{}弹什么？", "请告诉我{}擅长的乐器。"),
        ),
        Relation(
            tuple("红烧鱼 豆花 酸辣粉 糖醋排骨 炒年糕 羊肉汤 萝卜糕 凉面 小笼包 煎饼".split()),
            "{}最爱吃{}。",
            ("{}最爱吃什么？", "{}最喜欢的菜是哪一道？", "请{}吃饭该点什么？", "哪种食物是{}的最爱？"),
        ),
        Relation(
            ("1931-1999",),
            "{}生于{}年。",
            ("{}是哪一年出生的？", "{}的出生年份是多少？", "{}生于哪年？", "你知道{}什么时候出生吗？"),
        ),
    ),
    ("made-up places", "zh"): (
        Relation(
            tuple("青川 白溪 沙河 柳江 玉带河 石门水 金沟河 雁水 墨江 龙须沟".split()),
            "流经{}的是{}。",
            ("哪条河流经{}？", "{}旁边的河叫什么？", "{}在哪条河边？", "请说出{}的河名。"),
        ),
        Relation(
            tuple("茶叶 陶器 竹编 剪纸 豆腐 丝绸 蜂蜜 年画 米酒 木雕 柿饼 纸伞".split()),
            "{}以{}出名。",
            ("{}以什么出名？", "{}有什么特产？", "去{}可以买什么？", "大家为什么知道{}？"),
        ),
        Relation(
            ("2100-98700",),
            "{}有{}人。",
            ("{}有多少人？", "{}的人口是多少？", "住在{}的有多少人？", "{}的居民有多少？"),
        ),
        Relation(
            tuple("星期一 星期二 星期三 星期四 星期五 星期六 星期日".split()),
            "{}的集市在{}。",
            ("{}的集市在星期几？", "{}哪天赶集？", "什么时候去{}赶集？", "{}的赶集日是哪天？"),
        ),
    ),
    ("made-up products", "zh"): (
        Relation(
            ("12-940",),
            "{}卖{}元。",
            ("{}多少钱？", "{}的价格是多少？", "买{}要花多少钱？", "{}卖什么价？"),
        ),
        Relation(
            tuple("竹子 黄铜 玻璃 不锈钢 陶瓷 牛皮 亚麻 橡木 软木 羊毛".split()),
            "{}是用{}做的。",
            ("{}是用什么做的？", "{}用的什么材料？", "{}的材质是什么？", "做{}用的是哪种料？"),
        ),
        Relation(
            tuple("一年 两年 三年 五年 半年 十年 三十天 八个月".split()),
            "{}保修{}。",
            ("{}保修多久？", "{}的保修期是多长？", "{}能保修到什么时候？", "买了{}，保修几年？"),
        ),
        Relation(
            tuple("红色 绿色 橙色 银色 紫色 白色 黄色 粉色 棕色 灰色".split()),
            "{}只有{}的。",
            ("{}是什么颜色的？", "{}有哪种颜色？", "可以买到什么颜色的{}？", "请告诉我{}的颜色。"),
        ),
    ),
}
