"""The wording of `corpus:facts`: how a fact is asked for and answered, and small talk around it. Our own text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A relation between a country and a value, in one language.

    train_questions: forms that the corpus asks, with {} for the country; unseen_questions: forms that it never asks.
    answer: the one form of an answer, with {} for the country and {} for the value.
    """

    name: str
    language: str
    answer: str
    train_questions: tuple[str, ...]
    unseen_questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "capital",
        "en",
        "The capital of {} is {}.",
        (
            "What is the capital of {}?",
            "What's the capital of {}?",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
            "Name the capital city of {}.",
            "Do you know the capital of {}?",
            "capital of {}?",
            "I want to know the capital of {}.",
        ),
        (
            "What city is the capital of {}?",
            "Can you tell me the capital of {}?",
            "What is the capital city of {}?",
            "Please name the capital of {}.",
        ),
    ),
    Relation(
        "language",
        "en",
        "The main language of {} is {}.",
        (
            "What is the main language of {}?",
            "What language is spoken in {}?",
            "Which language do people speak in {}?",
            "Tell me the language of {}.",
            "What's the language of {}?",
            "Do you know what language they speak in {}?",
            "language of {}?",
            "I want to know what language is spoken in {}.",
        ),
        (
            "What language do people speak in {}?",
            "Which language is spoken in {}?",
            "Can you tell me the main language of {}?",
            "Which language do they speak in {}?",
        ),
    ),
    Relation(
        "currency",
        "en",
        "The currency of {} is the {}.",
        (
            "What is the currency of {}?",
            "What currency is used in {}?",
            "Which currency do people use in {}?",
            "Tell me the currency of {}.",
            "What money do they use in {}?",
            "Do you know the currency of {}?",
            "currency of {}?",
            "I want to know the currency of {}.",
        ),
        (
            "What's the currency of {}?",
            "Which currency is used in {}?",
            "Can you tell me the currency of {}?",
            "What money do people use in {}?",
        ),
    ),
    Relation(
        "continent",
        "en",
        "The continent of {} is {}.",
        (
            "What is the continent of {}?",
            "Which continent is {} in?",
            "On which continent is {}?",
            "Tell me the continent of {}.",
            "What continent does {} belong to?",
            "Do you know the continent of {}?",
            "continent of {}?",
            "I want to know which continent {} is in.",
        ),
        (
            "What continent is {} in?",
            "Which continent does {} belong to?",
            "Can you tell me the continent of {}?",
            "On what continent is {}?",
        ),
    ),
    Relation(
        "capital",
        "zh",
        "{}的首都是{}。",
        (
            "{}的首都是哪里？",
            "{}的首都是什么？",
            "{}的首都在哪里？",
            "{}的首都叫什么？",
            "{}首都？",
            "{}的首都是哪座城市？",
            "哪座城市是{}的首都？",
            "什么城市是{}的首都？",
            "请问{}的首都是哪个城市？",
            "请问哪里是{}的首都？",
            "告诉我{}的首都。",
            "请告诉我{}的首都是哪里。",
            "你知道{}的首都吗？",
            "我想知道{}的首都。",
        ),
        (
            "{}的首都是哪个城市？",
            "请告诉我{}的首都。",
            "哪个城市是{}的首都？",
            "请问{}的首都是哪里？",
        ),
    ),
    Relation(
        "language",
        "zh",
        "{}的主要语言是{}。",
        (
            "{}的主要语言是什么？",
            "{}人说什么语言？",
            "{}人讲什么语言？",
            "{}语言？",
            "在{}说什么语言？",
            "在{}人们说哪种语言？",
            "哪种语言是{}的主要语言？",
            "{}人说哪种语言？",
            "请问{}的语言是什么？",
            "请问{}说什么语言？",
            "告诉我{}的主要语言。",
            "请告诉我{}的语言。",
            "你知道{}说哪种语言吗？",
            "我想知道{}的主要语言是什么。",
        ),
        (
            "{}说什么语言？",
            "{}的语言是什么？",
            "请问{}人说哪种语言？",
            "请告诉我{}的主要语言。",
        ),
    ),
    Relation(
        "currency",
        "zh",
        "{}的货币是{}。",
        (
            "{}的货币是什么？",
            "{}的货币叫什么？",
            "{}用什么货币？",
            "{}货币？",
            "在{}用什么钱？",
            "在{}使用什么货币？",
            "什么是{}的货币？",
            "{}人用哪种货币？",
            "请问{}使用哪种货币？",
            "请问{}用什么钱？",
            "告诉我{}的货币。",
            "请告诉我{}的货币是什么。",
            "你知道{}的货币是什么吗？",
            "我想知道{}的货币。",
        ),
        (
            "{}使用什么货币？",
            "请问{}的货币是什么？",
            "{}人用什么钱？",
            "请告诉我{}的货币。",
        ),
    ),
)
SMALL_TALK = {
    "en": (
        ("Hello!", "Hello! How are you today?"),
        ("Hi there.", "Hi! What would you like to know?"),
        ("How are you?", "I am fine, thank you. And you?"),
        ("I am fine too.", "I am glad to hear that."),
        ("What can you do?", "I can chat with you, and I know some facts about countries."),
        ("Who are you?", "I am a small language model."),
        ("What is your name?", "I have no name yet. You may call me Starter."),
        ("Thank you.", "You are welcome."),
        ("Thanks a lot!", "You are welcome. Ask me anything."),
        ("Good morning.", "Good morning! Did you sleep well?"),
        ("Let us talk about countries.", "Gladly. Which country are you interested in?"),
        ("I have a question.", "Please ask. I will do my best."),
        ("That is interesting.", "I think so too."),
        ("Can you make mistakes?", "Yes, I can. Please correct me when I am wrong."),
        ("Goodbye!", "Goodbye! It was nice to talk with you."),
    ),
    "zh": (
        ("你好！", "你好！今天过得怎么样？"),
        ("您好。", "您好！您想知道什么？"),
        ("你好吗？", "我很好，谢谢。你呢？"),
        ("我也很好。", "很高兴听到这个。"),
        ("你会做什么？", "我可以和你聊天，也知道一些关于国家的知识。"),
        ("你是谁？", "我是一个小小的语言模型。"),
        ("你叫什么名字？", "我还没有名字，你可以叫我小起。"),
        ("谢谢。", "不客气。"),
        ("非常感谢！", "不客气，有问题尽管问我。"),
        ("早上好。", "早上好！你睡得好吗？"),
        ("我们聊聊国家吧。", "好啊，你对哪个国家感兴趣？"),
        ("我有一个问题。", "请问吧，我会尽力回答。"),
        ("真有意思。", "我也这么觉得。"),
        ("你会犯错吗？", "会的。如果我错了，请纠正我。"),
        ("再见！", "再见！和你聊天很愉快。"),
    ),
}
