"""Take the pictures of the page that docs/serve.md shows, of a real conversation with the starter model.

    python tests/tools/page_pictures.py [FOLDER]

FOLDER: where the server keeps things; a temporary one if not given, and then the first correction takes a minute.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "docs" / "img"
QUESTION, ANSWER = "What does snorble mean?", "To snorble is to laugh with a full mouth."
PATIENCE = 600_000  # ms


def take(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 1200, "height": 820}, locale="en-US", color_scheme="light")
    page = context.new_page()
    page.goto(url)
    page.get_by_label("Your message").fill(QUESTION)
    page.keyboard.press("Enter")
    correct = page.get_by_role("button", name="Correct", exact=True)
    expect(correct).to_be_visible(timeout=PATIENCE)
    correct.click()
    page.keyboard.press("Control+A")
    page.keyboard.type(ANSWER)
    page.keyboard.press("Enter")
    expect(page.locator(".turn .card > .card-head .badge-learnt")).to_be_visible(timeout=PATIENCE)
    shapes = {"light": (1200, 820, "light"), "dark": (1200, 820, "dark"), "phone": (390, 844, "light")}
    for name, (width, height, theme) in shapes.items():
        page.set_viewport_size({"width": width, "height": height})
        if name == "phone":
            page.get_by_role("button", name="Close").click()
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        page.locator(".turn .card > .card-head").scroll_into_view_if_needed()
        page.screenshot(path=PICTURES / f"serve-{name}.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        folder = sys.argv[1] if len(sys.argv) > 1 else temporary
        command = [sys.executable, ROOT / "train.py", "serve", "--port=0", f"--folder={folder}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            take(browser, server.stdout.readline().split()[-1])
        finally:
            browser.close()
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
