"""The server's pages in Chromium: what a person does there, and what is seen."""

import shutil
from contextlib import contextmanager

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright; pip install it")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="accessibility is checked by axe")
CHROMIUM = shutil.which("chromium")
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium; apt install chromium")

expect = playwright.expect
REPLY = 60_000  # ms that a reply may take
LEARNT = 300_000  # ms that a correction may take; the first one gets to know the model
QUESTION, ANSWER = "What does snorble mean?", "To snorble is to laugh with a full mouth."
PHONE = {"width": 360, "height": 740}
LIKELIEST = "localStorage.getItem('rwkv.sampling') ?? localStorage.setItem('rwkv.sampling', '{\"temperature\": 0}')"
STORY = "Tell me a long story about the sea, please."


def button(where, name):
    return where.get_by_role("button", name=name, exact=True)


def turn(page, n=-1):
    return page.locator("article.turn").nth(n)


def reply(page, n=-1):
    return turn(page, n).locator("[data-reply]")


def say(page, text):
    """Send a message and wait for the whole reply; returns it."""
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    expect(turn(page).locator(".bubble")).to_have_text(text)
    return answered(page)


def answered(page):
    expect(button(page, "Send")).to_be_visible(timeout=REPLY)
    expect(reply(page)).not_to_be_empty()
    return reply(page).inner_text()


def correct(page, answer):
    button(turn(page), "Correct").click()
    page.get_by_label("What the reply should have been").fill(answer)
    page.keyboard.press("Enter")
    return turn(page).locator("section.card").last


def status(card):
    return card.locator("> .card-head .badge")


@contextmanager
def recorded(page):
    """All texts that the last reply has had meanwhile."""
    page.evaluate(
        """() => {
            window.texts = [];
            const note = () => window.texts.push([...document.querySelectorAll("[data-reply]")].at(-1)?.textContent);
            const everything = {subtree: true, childList: true, characterData: true};
            new MutationObserver(note).observe(document.getElementById("turns"), everything);
        }"""
    )
    texts = []
    yield texts
    texts += [text for text in page.evaluate("window.texts") if text]


def serious(page):
    found = axe.Axe().run(page).response["violations"]
    return [(v["id"], [n["html"] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]


def overflow(page):
    """Pixels that the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
