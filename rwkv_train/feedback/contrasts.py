"""Questions that are near to one and are not it: other words in its words' places, and its words in other questions."""

from rwkv_train.feedback.rehearsal import RehearsalSet, nearest
from rwkv_train.feedback.words import kind, words


def substituted(rehearsal: RehearsalSet, question: str, count: int) -> list[str]:
    """Up to `count` questions with one content word of this one replaced by another that is near it.

    The rarer a word is, the more of them it gets.
    """
    vocabulary = rehearsal.vocabulary
    content, without = vocabulary.content(question), {word.text.lower() for word in words(question)}
    total, made = sum(vocabulary.rarity(word.text) for word in content), []
    for word in content:
        share = max(1, round(count * vocabulary.rarity(word.text) / total))
        made += [word.replaced(question, other) for other in vocabulary.nearest(word.text, share, without)]
    return list(dict.fromkeys(made))[:count]


def crossed(rehearsal: RehearsalSet, question: str, count: int) -> list[str]:
    """Up to `count` questions of the rehearsal set, the nearest first, asked of this one's rarest word."""
    content = rehearsal.vocabulary.content(question)
    if not content:
        return []
    ours, made = content[0].text, {}
    for i in nearest(rehearsal.form.begun(question), rehearsal.tokens_of_asked):
        asked, theirs = rehearsal.asked[i], rehearsal.content_of_asked[i]
        if len(made) == count:
            break
        if theirs and (kind(theirs[0].text) == "word") == (kind(ours) == "word"):
            made[theirs[0].replaced(asked, ours)] = None
    return [text for text in made if text != question]
