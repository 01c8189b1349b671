"""A request on the page in Chromium from the keyboard to Stop, across reloads and windows: `make test-browser`."""

import re

import pytest

from tests.serving.in_browser import LONG, PATIENCE, PROMPT, ask, cards, draw

pytestmark = pytest.mark.browser


def test_one_after_the_other_and_stop(page, browser, url):
    """A long request in one page, a second page that waits for it, and the button that ends the first."""
    ask(page, **LONG, Seed=1000)
    page.get_by_role("status").filter(has_text="base: step").wait_for()
    assert page.get_by_role("img", name="as they form").evaluate("image => image.naturalWidth") == 12
    other = browser.new_page()
    other.goto(url)
    ask(other, "a blue square")
    other.get_by_role("status").filter(has_text="waiting: 1 request before this one").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="stopped after").wait_for(timeout=PATIENCE)
    other.get_by_role("status").filter(has_text="1 picture in").wait_for(timeout=PATIENCE)
    other.close()


def test_who_leaves_waits_for_nothing(page, browser, url):
    """Pages with long requests are closed, one that is being drawn and one that waits: whoever comes next is drawn."""
    pages = [browser.new_page() for _ in range(2)]
    for number, each in enumerate(pages):
        each.goto(url)
        ask(each, **LONG, Seed=2000 + 1000 * number)
        each.get_by_role("status").filter(has_text=re.compile("preparing|step|waiting: 1")).wait_for()
    ask(page, "a blue square", Seed=77)
    page.get_by_role("status").filter(has_text="waiting: 2 requests").wait_for()
    for each in pages:
        each.close()
    page.get_by_role("status").filter(has_text="1 picture in").wait_for()


def test_a_reload_changes_nothing(page):
    """What was written and chosen, the request that is being drawn, and the button that ends it."""
    ask(page, "two green triangles", **LONG, Seed=3000, Negative_prompt="a red circle", sr_guidance=3)
    page.get_by_role("status").filter(has_text="base: step").wait_for()
    page.get_by_label("Seed", exact=True).fill("5")
    page.wait_for_timeout(1000)  # the server looks four times a second
    page.reload()
    page.get_by_role("status").filter(has_text="base: step").wait_for()
    wanted = {
        "Prompt": "two green triangles",
        "Negative prompt": "a red circle",
        "Seed": "5",
        "Pictures": "64",
    }
    for label, value in {**wanted, "base steps": "1000", "sr guidance": "3", "sr steps": ""}.items():
        assert page.get_by_label(label, exact=True).input_value() == value, label
    page.wait_for_timeout(15_000)  # longer than a page without a connection is waited for
    assert page.get_by_role("status").filter(has_text="base: step").count() == 1
    assert not page.get_by_role("button", name="Draw").is_enabled()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="stopped after").wait_for()


def test_two_reloads_in_a_row(page):
    """The page before the first lives on for some seconds and must not bring back what it had."""
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a red circle")
    page.wait_for_timeout(1000)
    page.reload()
    page.wait_for_function("document.querySelector('textarea').value == 'a red circle'")
    prompt.fill("two green triangles")
    ask(page, "two green triangles", **LONG, Seed=7000)
    page.get_by_role("status").filter(has_text="base: step").wait_for()
    page.wait_for_timeout(1000)
    page.reload()
    page.get_by_role("status").filter(has_text="base: step").wait_for()
    assert prompt.input_value() == "two green triangles"
    page.wait_for_timeout(12_000)
    page.get_by_role("status").filter(has_text="base: step").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="stopped after").wait_for()


def test_a_link_that_is_followed_again_says_what_it_says(page, url):
    link = f"{url}/?prompt=a+blue+square&seed=8"
    prompt = page.get_by_label("Prompt", exact=True)
    page.goto(link)
    prompt.fill("a red circle")
    page.wait_for_timeout(1000)
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_timeout(1000)
    assert prompt.input_value() == "a blue square"
    prompt.fill("a red circle")
    page.wait_for_timeout(1000)
    page.reload()
    page.wait_for_function("document.querySelector('textarea').value == 'a red circle'")


def test_another_tab_begins_anew(page, browser, url):
    page.get_by_label("Prompt", exact=True).fill("a blue square")
    page.wait_for_timeout(1000)
    other = browser.new_page()
    other.goto(url)
    other.wait_for_timeout(1000)
    assert other.get_by_label("Prompt", exact=True).input_value() == ""
    other.close()


@pytest.mark.parametrize("key", ["Control+Enter", "Meta+Enter"])
def test_keys_that_draw(page, key):
    seed = str(4000 + len(key))
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill(seed)
    prompt.press(key)
    page.get_by_role("status").filter(has_text="1 picture in").wait_for()
    assert (
        f"seed {seed} " in cards(page).first.inner_text()
    )  # the newest; the gallery shows a hundred at most
    assert prompt.input_value() == PROMPT  # no new line in it


def test_stop_while_a_program_is_compiled(page):
    """Another number of pictures in a batch needs the compiler, which nothing ends."""
    ask(page, base_steps=7, sr_steps=9, Seed=5000)
    page.get_by_role("status").filter(has_text="preparing").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="stopped after").wait_for(timeout=5000)
    ask(page, base_steps=7, sr_steps=9, Seed=5001)  # at once: it waits for its turn
    page.get_by_role("status").filter(has_text="1 picture in").wait_for()


@pytest.mark.parametrize("size", [(1280, 800), (390, 844), (2560, 1300)], ids=["laptop", "phone", "wide"])
def test_what_happens_is_in_view(page, size):
    """Prompt, buttons, progress and preview without scrolling; the gallery takes the width there is."""
    width, height = size
    page.set_viewport_size({"width": width, "height": height})
    draw(page, Seed=6000, Pictures=12, base_steps=2)
    ask(page, **LONG, Seed=6100)
    page.get_by_role("img", name="as they form").wait_for()
    for role, name in (
        ("button", "Draw"),
        ("button", "Stop"),
        ("progressbar", "Progress"),
        ("img", "as they form"),
    ):
        box = page.get_by_role(role, name=name).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, name
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
    page.get_by_role("button", name="Stop").click()
    boxes = [cards(page).nth(i).bounding_box() for i in range(12)]
    row = [box for box in boxes if box["y"] == boxes[0]["y"]]
    assert max(box["x"] + box["width"] for box in row) > width - 120
    assert len(row) == {1280: 3, 390: 1, 2560: 8}[width]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
