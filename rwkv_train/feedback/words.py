"""Whole words of any script: where they lie in a text, how rare they are, and which others a model puts beside them."""

import math
import re
from collections import Counter
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rwkv_train.models.base import RWKV
from rwkv_train.tokenizer import Tokenizer

# Scripts that put no spaces between words: kana, Chinese characters, Thai, Lao, Khmer, Burmese.
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
RUN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,:]\d+)*")
CONTENT = 0.5  # of the rarity of a text's rarest word: what is no mere form
COMMON = 1.5  # nats of rarity below which a word is of every text, and stands for no other
BOUND = 0.25  # of two characters that are a word
DIGITS = 10


class Word(NamedTuple):
    """A word of a text: where it begins and ends, and itself."""

    begin: int
    end: int
    text: str

    def replaced(self, text: str, other: str) -> str:
        """The text with another word in this one's place."""
        return text[: self.begin] + other + text[self.end :]


def words(text: str) -> list[Word]:
    """The words of a text in turn: letters, numbers, and of unspaced scripts single characters and adjacent pairs."""
    spans = []
    for run in RUN.finditer(text):
        at, end = run.span()
        while at < end:
            until = at + 1
            if UNSPACED.match(text[at]):
                spans.append((at, until))
                if until < end and UNSPACED.match(text[until]):
                    spans.append((at, until + 1))
            else:
                while until < end and not UNSPACED.match(text[until]):
                    until += 1
                spans.append((at, until))
            at = until
    return [Word(begin, end, text[begin:end]) for begin, end in spans]


def kind(word: str) -> str:
    """What may stand in a word's place: "number", "word", or a number of unspaced characters."""
    if word[0].isdigit():
        return "number"
    return f"{len(word)} unspaced" if UNSPACED.match(word[0]) else "word"


def stem(word: str) -> str:
    """A word's beginning, in which its forms agree."""
    return word.lower() if kind(word) != "word" else word.lower()[: max(3, len(word) - 2)]


class Vocabulary:
    """The words of some texts."""

    def __init__(self, texts: list[str], base: RWKV, tokenizer: Tokenizer):
        """base: its embedding says which words are near each other."""
        self.base, self.tokenizer, self.count = base, tokenizer, len(texts)
        found = [words(text) for text in texts]
        self._holding = Counter(key for some in found for key in {word.text.lower() for word in some})
        self._forms = Counter(word.text for some in found for word in self._whole(some))

    def rarity(self, word: str) -> float:
        """In nats: minus the logarithm of the share of texts that hold a word."""
        return math.log((self.count + 1) / (self._holding[word.lower()] + 1))

    def content(self, text: str) -> list[Word]:
        """The words that make a text what it is, the rarest first."""
        found = self._whole(words(text))
        least = CONTENT * max((self.rarity(word.text) for word in found), default=0.0)
        return sorted((w for w in found if self.rarity(w.text) >= max(least, 1e-9)), key=lambda w: -self.rarity(w.text))

    def _whole(self, found: list[Word]) -> list[Word]:
        """Of the words of a text in an unspaced script only the pairs that belong together, and what is left alone."""
        pairs = [(self._bound(word.text), word) for word in found if kind(word.text) == "2 unspaced"]
        whole, taken = [], set()
        for bound, word in sorted(pairs, key=lambda pair: -pair[0]):
            if bound >= BOUND and not taken & {word.begin, word.begin + 1}:
                taken |= {word.begin, word.begin + 1}
                whole.append(word)
        whole += [word for word in found if kind(word.text) != "2 unspaced" and word.begin not in taken]
        return sorted(whole)

    def _bound(self, pair: str) -> float:
        """How often two characters come together, of the times that they come: 0 to 1."""
        apart = self._holding[pair[0]] * self._holding[pair[1]]
        return self._holding[pair] / math.sqrt(apart) if self._holding[pair] > 1 else 0.0

    def nearest(self, word: str, count: int, without: set[str]) -> list[str]:
        """Up to `count` other words of its kind, the nearest first; none of the lower-case words in `without`.

        Of a word that is several tokens, which says little about it, half of them are made up of its own and others.
        """
        if kind(word) == "number":
            return _numbers(word, count)
        others, vectors = self._known
        order = (vectors @ normalize(self._vector(word), dim=0)).argsort(descending=True).tolist()
        near = dict.fromkeys(self._made_up(word, count // 2)) if kind(word) == "word" else {}
        for other in (others[i] for i in order):
            if len(near) == count:
                break
            if kind(other) == kind(word) and other.lower() not in without and stem(other) != stem(word):
                near[other.capitalize() if word[0].isupper() else other] = None
        return list(near)

    def _made_up(self, word: str, count: int) -> list[str]:
        """Up to `count` words with another token in the place of one of a word's."""
        ids, rng, made = self._ids(word), torch.Generator().manual_seed(sum(map(ord, word))), {}
        for n in range(DIGITS * count if len(ids) > 1 else 0):
            place = len(ids) - 1 - n % len(ids)
            others = self._tokens[place > 0]
            other = others[int(torch.randint(len(others), (1,), generator=rng))]
            text = self.tokenizer.decode([*ids[:place], other, *ids[place + 1 :]]).strip()
            if RUN.fullmatch(text) and text != word and len(made) < count:
                made[text] = None
        return list(made)

    @cached_property
    def _tokens(self) -> tuple[list[int], list[int]]:
        """(tokens that words begin with, those that they go on with)."""
        ids = [self._ids(form) for form in self._forms if kind(form) == "word"]
        return sorted({word[0] for word in ids}), sorted({token for word in ids for token in word[1:]})

    @cached_property
    def _known(self) -> tuple[list[str], Tensor]:
        """Words that may stand for others, each as it is mostly written, and their directions [N,C].

        What stands in one text alone and is no token is often no word, but what a model made up.
        """
        mostly: dict[str, str] = {}
        for form, _ in self._forms.most_common():
            mostly.setdefault(form.lower(), form)
        known = [form for form in mostly.values() if kind(form) != "number" and self.rarity(form) >= COMMON]
        known = [form for form in known if self._holding[form.lower()] > 1 or len(self._ids(form)) == 1] or known
        vectors = [self._vector(form) for form in known]
        return known, normalize(torch.stack(vectors), dim=-1) if vectors else torch.zeros(0, self.base.config.n_embd)

    def _vector(self, word: str) -> Tensor:
        """Where the embedding puts a word [C], as it stands in the middle of a text."""
        return self.base.emb.weight[self._ids(word)].float().sum(0)

    def _ids(self, word: str) -> list[int]:
        return self.tokenizer.encode(f" {word}" if kind(word) == "word" else word)


def _numbers(number: str, count: int) -> list[str]:
    """Other numbers of as many digits."""
    rng, others = torch.Generator().manual_seed(sum(map(ord, number))), {}
    for _ in range(DIGITS * count):
        drawn = iter(torch.randint(0, DIGITS, (len(number),), generator=rng).tolist())
        other = re.sub(r"\d", lambda digit, drawn=drawn: str(next(drawn) or digit[0]), number)
        if other != number:
            others[other] = None
    return list(others)[:count]
