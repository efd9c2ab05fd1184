"""The pages in a real browser, against the real server: what a person does, and what is on the screen then.

`server` (conftest.py) is a running server; its `url` has no slash at the end. Everybody there may talk, teach and
operate, as on loopback without tokens.
"""

import re
import shutil
from contextlib import contextmanager

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright; pip install it")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="accessibility is checked by axe")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium; apt install chromium")

expect = playwright.expect
REPLY = 60_000  # ms that a reply may take
LEARNT = 300_000  # ms that a correction may take; the first one gets to know the model
QUESTION, ANSWER = "What does snorble mean?", "To snorble is to laugh with a full mouth."
PHONE = {"width": 360, "height": 740}
LIKELIEST = "localStorage.getItem('rwkv.sampling') ?? localStorage.setItem('rwkv.sampling', '{\"temperature\": 0}')"
STORY = "Tell me a long story about the sea, please."


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """visit(path, **context): a page of its own person. At the end, none has had an error or asked anybody else."""
    pages, wrong = [], []

    def opened(path="/", watch=True, **context):
        page = browser.new_context(**{"locale": "en-US", **context}).new_page()
        page.add_init_script(LIKELIEST)
        if watch:
            page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("blob:", server.url)) or wrong.append(f"asked {r.url}"))
        pages.append(page)
        page.goto(server.url + path)
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert not wrong


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


def test_a_reply_is_shown_as_it_comes(visit):
    page = visit()
    with recorded(page) as texts:
        whole = say(page, STORY)
    assert len(set(texts)) > 1 and all(whole.startswith(text.rstrip()) for text in texts)
    expect(page.locator("#live")).to_contain_text(whole[:20])


def test_what_is_said_is_text_and_never_markup(visit):
    page = visit()
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#turns img, #turns b, #conversations img").count() == 0


def test_a_correction_from_edit_to_undo(visit, server):
    page = visit()
    before = say(page, QUESTION)
    card = correct(page, ANSWER)
    expect(reply(page)).to_have_text(ANSWER)
    expect(status(card)).to_have_text("learnt", timeout=LEARNT)
    expect(page.locator("#live")).to_contain_text("Learnt.")
    newest = page.request.get(f"{server.url}/v1/feedback").json()["data"][-1]
    outcome = newest["outcome"]
    assert (newest["question"], newest["answer"], newest["rejected"]) == (QUESTION, ANSWER, before)
    assert card.locator("dd.was").text_content() == outcome["answer_before"]
    assert card.locator("dd.is").text_content() == outcome["answer_after"]
    expect(card.locator(".curve-dot")).to_have_count(outcome["steps"] + 1)  # the last is drawn twice
    expect(card.get_by_text(re.compile(r"Drift [\d.]+ nats a token"))).to_be_visible()

    wordings, protected = card.locator("details.questions").all()
    expect(wordings.locator("q")).to_have_text(outcome["paraphrases"])
    protected.locator("summary").first.click()
    expect(protected.locator("q")).to_have_text(outcome["contrasts"])
    assert not serious(page)
    wordings.get_by_role("button", name="Refuse").first.click()
    protected.get_by_role("button", name="Include").first.click()
    for part, kind, text in ((wordings, "keep", "paraphrases"), (protected, "also", "contrasts")):
        expect(part.locator(".badge").first).to_have_text("learnt", timeout=LEARNT)
        sent = page.request.get(f"{server.url}/v1/feedback").json()["data"]
        assert (kind, outcome[text][0], newest["id"]) in [(f["kind"], f["question"], f["of"]) for f in sent]

    page.reload()
    card = turn(page).locator("section.card").first
    expect(status(card)).to_have_text("learnt")
    assert card.locator("dd.is").text_content() == outcome["answer_after"]
    expect(page.locator("#panel .history > li").filter(has_text="keeps its answer").first).to_be_visible()
    card.locator("> .card-head").get_by_role("button", name="Undo").click()
    expect(status(card)).to_have_text("undone", timeout=LEARNT)
    expect(reply(page)).to_have_text(before)
    assert page.request.get(f"{server.url}/v1/feedback/{newest['id']}").json()["status"] == "undone"


def test_a_correction_is_followed_again_after_a_reload(visit):
    page = visit()
    say(page, "What does flimble mean?")
    card = correct(page, "To flimble is to hop over a puddle.")
    expect(status(card)).to_have_text(re.compile("waiting|learning"))
    page.reload()
    expect(status(turn(page).locator("section.card").last)).to_have_text(
        re.compile("^(learnt|not learnt)$"), timeout=LEARNT
    )


def test_branches_come_from_editing_and_from_again(visit):
    page = visit()
    say(page, "Hello")
    say(page, "And then?")
    button(turn(page, 0), "Edit this message; the conversation branches there").click()
    page.get_by_label("Your message, once more").fill("Good morning")
    page.keyboard.press("Control+Enter")
    expect(turn(page, 0).locator(".bubble")).to_have_text("Good morning")
    answered(page)
    expect(page.locator("article.turn")).to_have_count(1)
    button(turn(page), "Again").click()
    expect(turn(page).get_by_role("group", name="Branches")).to_contain_text("3/3")
    answered(page)
    for _ in range(2):
        button(turn(page, 0), "Branch before").click()
    expect(turn(page, 0).get_by_role("group", name="Branches")).to_contain_text("1/3")
    expect(page.locator("article.turn")).to_have_count(2)
    page.reload()
    expect(page.locator("article.turn")).to_have_count(2)
    expect(turn(page, 1).locator(".bubble")).to_have_text("And then?")


def test_nothing_is_lost_on_reload(visit):
    page = visit()
    said = say(page, "Hello")
    page.get_by_label("Your message").fill("half a sent")
    page.reload()
    expect(page.get_by_label("Your message")).to_have_value("half a sent")
    expect(reply(page)).to_have_text(said)
    button(turn(page), "Correct").click()
    page.get_by_label("What the reply should have been").fill("half a corr")
    page.reload()
    expect(page.get_by_label("What the reply should have been")).to_have_value("half a corr")


def kept(page, server):
    """The first reply of the only conversation, as the server has it."""
    name = "Object.keys(localStorage).find((name) => name.startsWith('rwkv.conversation.'))"
    response = page.evaluate(f"Object.values(JSON.parse(localStorage[{name}]).turns)[0].response")
    return page.request.get(f"{server.url}/v1/responses/{response}").json()


def begin_long_reply(page):
    """Of the model without corrections, since its likeliest reply to that does not end by itself."""
    page.evaluate("localStorage.setItem('rwkv.sampling', JSON.stringify({temperature: 0, max_output_tokens: 4096}))")
    page.get_by_label("Model", exact=True).select_option("base")
    page.get_by_label("Your message").fill(STORY)
    page.keyboard.press("Enter")
    expect(reply(page)).not_to_be_empty(timeout=REPLY)


def test_a_reply_that_a_reload_interrupts_is_fetched(visit, server):
    page = visit()
    begin_long_reply(page)
    page.reload()
    expect(turn(page).get_by_text("This reply was broken off.")).to_be_visible()
    expect(turn(page)).not_to_have_attribute("aria-busy", "true", timeout=REPLY)
    whole = kept(page, server)
    assert whole["status"] == "incomplete"
    assert reply(page).text_content() == whole["output"][0]["content"][0]["text"]
    expect(button(turn(page), "Again")).to_be_visible()


def test_a_reply_can_be_stopped_and_gone_on_from(visit, server):
    page = visit()
    begin_long_reply(page)
    button(page, "Stop").click()
    expect(turn(page).get_by_text("You stopped this reply.")).to_be_visible(timeout=REPLY)
    assert reply(page).text_content() == kept(page, server)["output"][0]["content"][0]["text"]
    page.evaluate("localStorage.removeItem('rwkv.sampling')")
    say(page, "Go on")
    expect(page.locator("article.turn")).to_have_count(2)


def test_without_the_server_the_text_stays(visit):
    page = visit(watch=False)
    expect(page.get_by_label("Your message")).to_be_visible()
    page.context.set_offline(True)
    page.get_by_label("Your message").fill("Are you there?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_label("Your message")).to_have_value("Are you there?")
    page.context.set_offline(False)
    expect(page.get_by_role("alert")).to_be_hidden(timeout=REPLY)
    say(page, "Are you there?")
    expect(page.get_by_label("Your message")).to_have_value("")


def test_with_the_keyboard_alone(visit):
    page = visit()
    expect(page.get_by_label("Your message")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the message field")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    answered(page)
    page.keyboard.press("Alt+C")
    expect(page.get_by_label("What the reply should have been")).to_be_focused()
    page.keyboard.press("Escape")
    expect(button(turn(page), "Correct")).to_be_focused()
    page.keyboard.press("Alt+H")
    expect(page.get_by_role("dialog", name="Help")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+S")
    expect(page.get_by_role("complementary").get_by_label("Boldness")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("complementary")).to_be_hidden()


def test_both_languages_have_the_same_words(visit):
    page = visit(locale="zh-CN")
    expect(page.get_by_label("你的消息")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    names = page.evaluate(
        """async () => {
            const names = (module, language) => Object.keys(module[language]).sort().join();
            const [en, zh] = [await import("/page/words_en.js"), await import("/page/words_zh.js")];
            const others = [await import("/page/words_settings.js"), await import("/page/words_room.js")];
            return [[names(en, "en"), names(zh, "zh")], ...others.map((m) => [names(m, "en"), names(m, "zh")])];
        }"""
    )
    assert all(english == chinese for english, chinese in names)
    button(page, "English").click()
    expect(page.get_by_label("Your message")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    assert not serious(page)
    say(page, "Hello")
    correct(page, "Hello to you, too.")
    expect(page.locator("#panel .history > li").first).to_be_visible()
    assert not serious(page)
    turn(page).locator(".card-head").get_by_role("button", name="Undo").click()
    button(page, "Settings").click()
    expect(page.get_by_label("Most steps")).to_be_visible()
    assert not serious(page)
    page.keyboard.press("Alt+H")
    assert not serious(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_room(visit, scheme):
    page = visit("/room", color_scheme=scheme)
    expect(page.get_by_role("heading", name="Operator")).to_be_visible()
    assert not serious(page)


def test_on_a_phone_nothing_is_wider_than_the_screen(visit):
    page = visit(viewport=PHONE, has_touch=True)
    say(page, "Hello " + "w" * 200)
    button(turn(page), "Correct").click()
    assert overflow(page) <= 0
    page.keyboard.press("Escape")
    for name in ("Corrections", "Settings"):
        button(page, name).click()
        expect(button(page, "Close")).to_be_focused()
        assert overflow(page) <= 0
        page.keyboard.press("Escape")
    button(page, "Conversations").click()
    expect(button(page, "New conversation")).to_be_visible()
    assert overflow(page) <= 0


def test_on_a_phone_the_room_is_not_wider_than_the_screen(visit):
    page = visit("/room", viewport=PHONE)
    expect(page.get_by_role("heading", name="Operator")).to_be_visible()
    assert overflow(page) <= 0


def test_a_room_with_two_viewers(visit, server):
    ada, bo = visit("/room"), visit("/room")
    for page, name in ((ada, "Ada"), (bo, "Bo")):
        expect(page.get_by_text("Connected")).to_be_visible()
        page.get_by_label("Your name").fill(name)
        page.keyboard.press("Tab")
        expect(page.get_by_text("Connected")).to_be_visible()
    ada.get_by_label("Your message").fill("Hello")
    ada.keyboard.press("Enter")
    for page in (ada, bo):
        expect(page.locator("#transcript .who").first).to_have_text("Ada", timeout=REPLY)
        expect(page.locator("#transcript .bubble").first).to_have_text("Hello")
    said = ada.locator("#transcript li").first.inner_text()
    expect(bo.locator("#transcript li").first).to_have_text(said.replace("\n", ""))

    bo.get_by_label("It should have been").fill("Hello, room.")
    button(bo, "Teach").click()
    for page in (ada, bo):
        expect(page.locator("#learnt .compared")).to_be_visible(timeout=LEARNT)
        newest = page.request.get(f"{server.url}/v1/feedback").json()["data"][-1]
        assert (newest["question"], newest["answer"]) == ("Hello", "Hello, room.")
        assert page.locator("#learnt dd.is").text_content() == newest["outcome"]["answer_after"]
    button(bo, "Undo the last correction").click()
    expect(ada.get_by_text("The last correction was taken back.").first).to_be_visible(timeout=LEARNT)


def test_who_is_muted_in_the_room_keeps_the_text(visit):
    ada, bo = visit("/room"), visit("/room")
    for page, name in ((ada, "Ada"), (bo, "Bo")):
        page.get_by_label("Your name").fill(name)
        page.keyboard.press("Tab")
        expect(page.get_by_text("Connected")).to_be_visible()
    bo.get_by_label("Name", exact=True).fill("Ada")
    button(bo, "Mute").click()
    expect(button(bo, "Let speak: Ada")).to_be_visible()
    ada.get_by_label("Your message").fill("Let me speak")
    ada.keyboard.press("Enter")
    expect(ada.get_by_role("alert")).to_contain_text("Not taken")
    expect(ada.get_by_label("Your message")).to_have_value("Let me speak")
    button(bo, "Let speak: Ada").click()
    expect(bo.get_by_text("Nobody is muted.")).to_be_visible()
