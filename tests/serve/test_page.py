"""The page to talk and correct on, against the real server: what a person does, and what is on the screen then."""

import re

from browsing import (
    ANSWER,
    LEARNT,
    NEEDED,
    QUESTION,
    REPLY,
    STORY,
    answered,
    button,
    correct,
    expect,
    recorded,
    reply,
    say,
    serious,
    status,
    turn,
)

pytestmark = NEEDED


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


def test_a_preset_goes_with_what_is_said(visit):
    page = visit()
    for name in ("greedy", ""):
        button(page, "Settings").click()
        page.get_by_label("Way of replying").select_option(name)
        page.keyboard.press("Escape")
        with page.expect_request("**/v1/responses") as asked:
            say(page, "Hello")
        assert asked.value.post_data_json.get("preset", "") == name


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
