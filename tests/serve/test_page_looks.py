"""The pages in both themes and languages and on a phone, and the room with two viewers."""

import pytest
from browsing import LEARNT, NEEDED, PHONE, REPLY, button, correct, expect, overflow, say, serious, turn

pytestmark = NEEDED


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
