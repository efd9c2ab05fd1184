"""Other wordings of one question by rule, and things that nobody has heard of.

Only what the user says varies, and never what stands for {x}: whatever is asked, the reply can copy it.
"""

import random
import re
from collections.abc import Callable, Collection

from rwkv_train.data.corpora.talk.texts import bare

Draw = random.Random
OPENERS = {
    "en": (
        *("Hi! ", "Hello! ", "Good morning! ", "Hey, ", "Hi there, ", "So, ", "Um, ", "Well, ", "Okay, ", "Please, "),
        *("Tell me, ", "Excuse me, ", "Sorry, ", "By the way, ", "One question: ", "I wonder: ", "Just curious: "),
    ),
    "zh": (
        *("你好，", "您好，", "嗨，", "那个，", "嗯，", "对了，", "好吧，", "顺便问一下，", "请问，", "我想问一下，"),
        *("打扰一下，", "不好意思，", "有个问题：", "我想知道，", "说真的，", "那么，", "喂，", "请告诉我，"),
    ),
}
CLOSERS = {
    "en": (
        ", please?",
        "? Thanks.",
        "? Thank you!",
        ", if I may ask?",
        ", do you know?",
        "? I am curious.",
        "??",
        "?!",
    ),
    "zh": ("？谢谢。", "？谢谢你！", "？我很好奇。", "？？", "？！", "?", "，你知道吗？", "？说说看。"),
}
MARKS = {"en": (".", "!"), "zh": ("。", "！")}
CONTRACTIONS = """
what is/what's who is/who's where is/where's how is/how's when is/when's that is/that's it is/it's there is/there's
I am/I'm you are/you're do not/don't does not/doesn't did not/didn't is not/isn't are not/aren't can not/can't
cannot/can't I will/I'll I have/I've going to/gonna want to/wanna you/u please/pls
"""
CONFUSED = "的/得 得/的 在/再 吗/嘛 吗/么 做/作 哪/那 你/您 什么/啥 怎么/咋"
LOWERED = re.compile(
    r"(What|Who|Where|When|Why|How|Which|Whose|Do|Does|Did|Can|Could|Is|Are|Was|Were|Will|Would|Should|May|Have|Has|"
    r"Tell|Say|Name|Give|Explain|Define|Describe|Show|At|From|Until|In|On|The|And)\b"
)
PAIRS_ZH = [tuple(pair.split("/")) for pair in CONFUSED.split()]
PAIRS_EN = [
    pair for full, short in re.findall(r"(\w+(?: \w+)?)/(\S+)", CONTRACTIONS) for pair in ((full, short), (short, full))
]
SMALL = {"a", "an", "the", "of", "in", "on", "at", "for", "to", "and", "my", "your", "by", "with", "from"}
ADJECTIVES = (
    "old new little big red green blue quiet famous strange local other first last best small long grey".split()
)
PREFIXES_ZH = "老 新 小 大 那个 这个 红色的 附近的 有名的 奇怪的 另一个 最好的".split()
ONSETS = "b b c d d f g h j k l l m m n n p p r r s s t t v w z bl br ch dr fl gl gr kr pl qu sh sk sn st th tr".split()
VOWELS = "a a e e i i o o u u ai ea ee oo ou".split()
CODAS = ["", *"b ck d ff g k l ll m n n nd ng nt p r rk rt s sh st t x".split()]


def reworded(template: str, language: str, draw: Draw, held_out: Collection[str] = (), edits: bool = True) -> str:
    """A template, or another wording of it by rule, of the same meaning; {x} stays as it is.

    held_out: bare forms that must not come out. edits: whether words may change, too, or only what stands around them.
    """
    other = _edited(template, language, draw) if edits and draw.random() < 0.3 else template
    if bare(other) in held_out:
        other = template
    return _decorated(other, language, draw)


def _edited(template: str, language: str, draw: Draw) -> str:
    """Contractions, or a small typing error."""
    if language == "zh":
        return _replaced(template, PAIRS_ZH, draw)
    if draw.random() < 0.6:
        return _replaced(template, PAIRS_EN, draw)
    return _misspelt(template, draw)


def _replaced(template: str, pairs: list[tuple[str, str]], draw: Draw) -> str:
    """One of the pairs that fit, written the other way."""
    edge = r"\b" if pairs is PAIRS_EN else ""
    finds = [(re.search(edge + re.escape(old) + edge, template, re.I), new) for old, new in pairs]
    fitting = [(found, new) for found, new in finds if found]
    if not fitting:
        return template
    found, new = draw.choice(fitting)
    new = new[0].upper() + new[1:] if found[0][0].isupper() else new
    return template[: found.start()] + new + template[found.end() :]


def _misspelt(template: str, draw: Draw) -> str:
    words = list(re.finditer(r"[A-Za-z]{5,}", template))
    if not words:
        return template
    found = draw.choice(words)
    at = draw.randrange(found.start() + 1, found.end() - 1)
    here, there = template[at], template[at + 1]
    return template[:at] + draw.choice((there + here, here, there, here + here + there)) + template[at + 2 :]


def _decorated(text: str, language: str, draw: Draw) -> str:
    """The text with an opener, a closer, in small letters, without its last mark or with one, now and then."""
    question = text.endswith(("?", "？"))
    if question and draw.random() < 0.2:
        opener = draw.choice(OPENERS[language])
        lower = not opener.endswith("! ") and LOWERED.match(text)
        text = opener + (text[0].lower() + text[1:] if lower else text)
    if question and draw.random() < 0.12:
        text = text[:-1] + draw.choice(CLOSERS[language])
    elif draw.random() < 0.2:
        text = text.rstrip("?？.。!！") or text
    elif not text.endswith((*MARKS["en"], *MARKS["zh"], "?", "？")) and draw.random() < 0.4:
        text += draw.choice(MARKS[language])
    if language == "en" and draw.random() < 0.15:
        text = "{x}".join(part.lower() for part in text.split("{x}"))
    return text


def filled(template: str, thing: str) -> str:
    """The template with a thing in it; a reply begins with a capital letter."""
    text = template.replace("{x}", thing)
    return text[0].upper() + text[1:] if template.startswith("{x}") else text


def varied(thing: str, language: str, draw: Draw) -> str:
    """A thing, one of its kind, or one that is called by a made-up word."""
    how: Callable[[str, Draw], str] = draw.choice((_kept, _kept, _invented, _invented, _described))
    return {"en": how, "zh": {_invented: _invented_zh, _described: _described_zh}.get(how, how)}[language](thing, draw)


def unheard(thing: str, language: str, draw: Draw) -> str:
    """A thing called by made-up words alone."""
    return (_invented_zh if language == "zh" else _invented)(thing, draw)


def _kept(thing: str, draw: Draw) -> str:
    return thing


def _word(draw: Draw) -> str:
    syllables = draw.choice((1, 2, 2, 2, 3))
    word = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(syllables)) + draw.choice(CODAS)
    return word.lstrip("bcdfghjklmnpqrstvwxyz") if len(word) > 5 and draw.random() < 0.15 else word


def _invented(thing: str, draw: Draw) -> str:
    """With made-up words for those that carry the meaning, for all or the last one: "a lynx" is "a mavet"."""
    words = thing.split()
    places = [place for place, word in enumerate(words) if word.lower() not in SMALL]
    for place in places if draw.random() < 0.5 else places[-1:]:
        new = _word(draw)
        words[place] = new.capitalize() if words[place][0].isupper() else new
    return _with_article(words)


def _described(thing: str, draw: Draw) -> str:
    """With an adjective after the article: "the old library"; what has no article stays as it is."""
    words = thing.split()
    return _with_article([words[0], draw.choice(ADJECTIVES), *words[1:]]) if words[0] in ("a", "an", "the") else thing


def _with_article(words: list[str]) -> str:
    if words[0] in ("a", "an") and len(words) > 1:
        words = ["an" if words[1][0] in "aeiou" else "a", *words[1:]]
    return " ".join(words)


HAN = re.compile(r"[\u4e00-\u9fff]")
CHARACTERS = (
    "安白宝北贝本彩草长晨城春大丹灯电冬斗豆朵尔飞丰风芙福古谷光桂海河荷红湖花华欢黄辉吉佳江金锦静菊卡康可空蓝乐雷力丽莲林"
    "灵龙鹿露罗洛麦满梅美米密明木墨南宁诺欧盘平普奇千青秋球泉人日荣如瑞沙山上深石水松苏塔太桃天田铁万望微维温文西溪夏仙香"
    "小晓心新星雪雅岩阳叶银英永雨玉园圆远月云泽珍真正之枝中竹子紫宗左"
    "店房室楼院校门车船路桥港站馆场厅衣鞋帽袋包书笔纸画琴鼓棋牌杯碗锅刀勺桌椅床柜箱窗墙砖瓦井池寺庙市县村镇区街巷码头"
    "猫狗牛羊马鸡鸭鱼鸟虫蛇虎狼熊鼠兔猴象鹅蜂蝶蛙龟蟹虾面饭菜汤茶酒奶糖盐油酱醋饼糕果瓜桔梨枣葱姜蒜笋藕菇"
    "机脑网线钟表镜梯炉泵轮轴钉针布棉绳胶蜡漆药剂片膏血骨肉皮毛牙眼耳手足发气火冰霜雾虹泥铜铝"
    "收存取办工会商务学医卫护消防警检票邮报游戏健身儿童老体操音舞剧影动植历史科技博物图展览休闲租修洗理"
)


def _invented_zh(thing: str, draw: Draw) -> str:
    """With other characters for all but the last one, or for all; what is not Chinese stays."""
    places = [place for place, letter in enumerate(thing) if HAN.match(letter)]
    if len(places) > 2 and draw.random() < 0.5:
        places = places[:-1]
    letters = list(thing)
    for place in places[:4]:
        letters[place] = draw.choice(CHARACTERS)
    return "".join(letters)


def _described_zh(thing: str, draw: Draw) -> str:
    return draw.choice(PREFIXES_ZH) + thing
