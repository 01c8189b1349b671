"""The page in the system's Chromium, as somebody uses it: `make test-browser`."""

import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.sampling.pictures import METADATA_KEY
from imagen_jax.serving.request import MAX_IMAGES, MAX_STEPS

pytestmark = pytest.mark.browser

PATIENCE = 300_000  # milliseconds: the first picture waits for the compiler
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "a red circle"
FOREIGN = "evil.example"


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed"
    with sync_playwright() as playwright:
        # Chromium's sandbox does not run as root, which continuous integration often is.
        # As an attacker's name server would: a foreign name leads to this machine.
        names = f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", names])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def start(model_folder, subprocess_env, cache):
    """start(flag, …) → (process, URL) of a server that has just begun."""
    running = []

    def begin(*flags, model=model_folder):
        command = [sys.executable, "-m", "imagen_jax", "serve", f"--model={model}", "--port=0"]
        environment = {**subprocess_env(), "IMAGEN_JAX_CACHE": str(cache)}
        process = subprocess.Popen(
            [*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        return process, found[0]

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gallery")


@pytest.fixture(scope="module")
def url(start, folder):
    return start(f"--out={folder}", "--batch_size=1")[1]


@pytest.fixture
def page(browser, url):
    """An empty page; whatever it asks for beyond the server, and every error of its scripts, fails the test."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, accept_downloads=True, base_url=url
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    strange, errors = [], []

    def look(request):
        if (
            urlsplit(request.url).scheme not in ("data", "blob")
            and urlsplit(request.url).netloc not in served
        ):
            strange.append(request.url)

    served = {urlsplit(url).netloc}
    page.on("request", look)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    assert not strange and not errors


def ask(page, prompt=PROMPT, **fields):
    """Fills in the form and clicks."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
    page.get_by_role("button", name="Draw").click()


def draw(page, prompt=PROMPT, **fields):
    """Fills in the form, clicks and waits for the end; the line below the button."""
    # A page that has drawn before says so until the server has seen the click.
    page.evaluate(
        """() => {
          window.heard = false
          const observer = new MutationObserver(() => { window.heard = true })
          for (const line of document.querySelectorAll("[role=status]"))
            observer.observe(line, {subtree: true, childList: true, characterData: true})
        }"""
    )
    ask(page, prompt, **fields)
    page.wait_for_function("window.heard")
    status = page.get_by_role("status").filter(has_text=re.compile(r"pictures? in |failed|stopped"))
    status.wait_for()
    return status.inner_text()


def pixels(page, locator):
    """A picture as the browser has it."""
    address = locator.evaluate("image => image.decode().then(() => image.src)")
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB"))


def cards(page):
    return page.get_by_role("list", name="Gallery").get_by_role("listitem")


def test_a_prompt_a_click_and_pictures(page, folder):
    """The picture on the page is the one that `imagen-jax sample` makes of the same prompt and seed."""
    assert draw(page, Seed=5, Pictures=2).startswith("2 pictures in ")
    assert cards(page).count() == 2
    shown = cards(page).locator("img")
    assert [shown.nth(i).evaluate("image => image.naturalWidth") for i in range(2)] == [16, 16]
    assert "seed 5" in cards(page).nth(0).inner_text() and "seed 6" in cards(page).nth(1).inner_text()
    files = sorted(folder.glob("*.png"))
    assert len(files) == 2
    for i, file in enumerate(files):
        np.testing.assert_array_equal(pixels(page, shown.nth(i)), np.asarray(Image.open(file)))
    screenshot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    box = shown.nth(0).bounding_box()
    top, left = int(box["y"]) + 8, int(box["x"]) + 8
    assert screenshot[top : top + 200, left : left + 200].std() > 10  # something is drawn there


def test_the_download_is_the_file_that_sample_writes(page, model_folder, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("IMAGEN_JAX_CACHE", str(cache))
    draw(page, Seed=7)
    with page.expect_download() as download:
        cards(page).first.get_by_text("Download").click()
    assert main(["sample", PROMPT, f"--model={model_folder}", "--seed=7", f"--out={tmp_path}"]) == 0
    (expected,) = tmp_path.glob("00000-*.png")
    assert download.value.suggested_filename == expected.name
    got, wanted = Image.open(download.value.path()), Image.open(expected)
    np.testing.assert_allclose(np.asarray(got, int), np.asarray(wanted, int), atol=1)
    assert json.loads(got.info[METADATA_KEY]) == json.loads(wanted.info[METADATA_KEY])
    record = page.request.get(cards(page).first.locator("img").get_attribute("src") + "/record")
    assert record.json() == json.loads(wanted.info[METADATA_KEY])


def test_settings_change_the_picture_and_the_link_makes_it_again(page, folder):
    draw(page, Seed=11)
    plain = pixels(page, cards(page).first.locator("img"))
    draw(page, "a blue square", Seed=11)
    other = pixels(page, cards(page).first.locator("img"))
    fields = {"base_steps": 3, "sr_guidance": 4, "Negative_prompt": "two green triangles"}
    draw(page, "a blue square", Seed=11, **fields)
    changed = pixels(page, cards(page).first.locator("img"))
    assert "steps 3, 2 · guidance 1.35, 4" in cards(page).first.inner_text()
    for a, b in ((plain, other), (other, changed), (plain, changed)):
        assert np.abs(a.astype(int) - b).mean() > 1  # of 255
    before = len(list(folder.glob("*.png")))
    cards(page).first.get_by_text("Make it again").click()
    page.wait_for_url(re.compile("seed=11"))
    assert page.get_by_label("Prompt", exact=True).input_value() == "a blue square"
    assert page.get_by_label("base steps").input_value() == "3"
    assert page.get_by_label("base guidance").input_value() == ""
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("status").filter(has_text="1 picture in").wait_for()
    np.testing.assert_array_equal(pixels(page, cards(page).first.locator("img")), changed)
    assert len(list(folder.glob("*.png"))) == before


def test_a_prompt_is_no_markup(page):
    """It is shown as it was written, in the text, in the picture's description and in the link that makes it again."""
    prompt = """<img src=x onerror="document.title='seized'"> & "it's" </div><b>bold</b>"""
    draw(page, prompt, Seed=21)
    card = cards(page).first
    assert prompt in card.inner_text() and card.locator("img").get_attribute("alt") == prompt
    assert card.locator("b").count() == 0 and card.locator("img").count() == 1
    card.get_by_text("Make it again").click()
    page.wait_for_url(re.compile("seed=21"))
    assert page.get_by_label("Prompt", exact=True).input_value() == prompt and page.title() == "imagen-jax"


def test_a_random_seed(page):
    seeds = []
    for _ in range(2):
        old = page.get_by_label("Seed", exact=True).input_value()
        page.get_by_role("button", name="Random").click()
        page.wait_for_function(
            "old => document.activeElement && [...document.querySelectorAll('input')]"
            ".some(input => input.ariaLabel === 'Seed' && input.value !== old)",
            arg=old,
        )
        seeds.append(page.get_by_label("Seed", exact=True).input_value())
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("", {}, "the prompt is empty"),
        (PROMPT, {"base_steps": 0}, "steps must be at least 1, got 0"),
        (PROMPT, {"base_steps": 1.5}, "base steps 1.5 is not a whole number"),
        (PROMPT, {"Pictures": 65}, "the number of pictures must be 1 to 64, got 65"),
        (PROMPT, {"base_guidance": 1, "sr_guidance": 1, "Negative_prompt": "x"}, "needs guidance"),
    ],
)
def test_an_error_is_one_line_in_the_page(page, prompt, fields, message):
    before = cards(page).count()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
    page.get_by_role("button", name="Draw").click()
    alert = page.get_by_role("alert").filter(has_text=message)
    alert.wait_for()
    assert "\n" not in alert.inner_text() and cards(page).count() == before
    assert draw(page, base_steps="", base_guidance="", sr_guidance="", Negative_prompt="", Pictures=1, Seed=0)
    assert not page.get_by_role("alert").is_visible()


def test_a_broken_link_says_so(page, url):
    page.goto(f"{url}/?prompt=x&steps=many")
    alert = page.get_by_role("alert").filter(has_text="--steps many: 'many' is not a whole number")
    alert.wait_for()
    assert alert.count() == 1 and "\n" not in alert.inner_text()


LONG = {"base_steps": 1000, "Pictures": MAX_IMAGES}


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
    before = cards(page).count()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill(str(4000 + len(key)))
    prompt.press(key)
    page.get_by_role("status").filter(has_text="1 picture in").wait_for()
    assert cards(page).count() == before + 1
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


def get(url, target):
    """(status, body) of a request that no browser would send so."""
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60)
    with connection, connection.makefile("rb") as answer:
        connection.sendall(
            b"GET "
            + target
            + f" HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n\r\n".encode()
        )
        status = int(answer.readline().split()[1])
        return status, answer.read().decode()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (b"prompt=x&steps=1e9", "'1e9' is not a whole number"),
        (b"prompt=x&steps=1000000000", f"at most {MAX_STEPS} steps"),
        (b"prompt=x&guidance=nan", "'nan' is not a number"),
        (b"prompt=x&guidance=1e300", "guidance_weight"),
        (b"prompt=x&seed=-1", "seeds must lie in 0"),
        (b"prompt=x&seed=" + b"9" * 4000, "is not a whole number"),
        (b"prompt=x&steps=0", "steps must be at least 1"),
        (b"prompt=x&prompt=y", "twice"),
        (b"prompt[]=x", "unknown parameter"),
        (b"prompt=caf%e9", "not UTF-8"),
        (b"prompt=%ed%a0%bc", "not UTF-8"),
        (b"prompt=%00%0a</script>&x", "unknown parameter"),
        (b"prompt=" + b"x" * 100_000, "the link has 100007 bytes"),
        (b"prompt=x&steps=" + b"1," * 40_000, "give one value"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_strangers_link_is_a_message(url, query, message):
    status, body = get(url, b"/?" + query)
    assert (status, message in body) == (200, True)


def test_other_addresses_of_strangers(url):
    for target in (
        b"/?prompt=caf\xe9",
        b"/pictures/%ff",
        b"/pictures/%00",
        b"/pictures/a/record",
        b"/x",
        b"/\xff",
        b"*",
        b"//evil/",
    ):
        assert 400 <= get(url, target)[0] < 500, target
    assert get(url, b"/pictures/x?download=maybe")[0] in (404, 422)


def test_another_name_for_this_machine_is_refused(browser, start, url):
    """DNS rebinding: the page under a stranger's name, which leads here."""
    page = browser.new_page()
    response = page.goto(f"http://{FOREIGN}:{urlsplit(url).port}/")
    assert response.status == 400
    assert response.text().startswith(f"Host '{FOREIGN}:") and response.text().count("\n") == 1
    _, named = start(f"--allow_host={FOREIGN}")
    page.goto(f"http://{FOREIGN}:{urlsplit(named).port}/")
    page.get_by_role("button", name="Draw").click()  # goes through the websocket
    page.get_by_role("alert").filter(has_text="the prompt is empty").wait_for()
    page.close()


CONNECT = """address => new Promise(done => {
    const socket = new WebSocket(address);
    socket.onopen = () => done("opened");
    socket.onerror = () => done("refused");
})"""


def test_a_page_of_another_site_is_refused(browser, url):
    """It is served from this machine, too, at another port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page, statuses = browser.new_page(), {}
        page.on("response", lambda response: statuses.update({response.url: response.status}))
        websocket = f"ws://{urlsplit(url).netloc}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        page.goto(f"http://127.0.0.1:{other.server_address[1]}/")
        assert page.evaluate(CONNECT, websocket) == "refused"
        post = "url => fetch(url, {method: 'POST', mode: 'no-cors', body: '40'}).then(() => 'sent')"
        polling = f"{url}/_nicegui_ws/socket.io/?EIO=4&transport=polling"
        assert page.evaluate(post, polling) == "sent" and statuses[polling] == 403
        record = "url => fetch(url).then(() => 'answered', () => 'refused')"
        assert page.evaluate(record, f"{url}/pictures/x/record") == "refused"
        page.goto(url)
        assert page.evaluate(CONNECT, websocket) == "opened"
        page.close()
        other.shutdown()


def test_the_gallery_outlives_page_and_server(start, folder, page):
    names = [card.get_attribute("src") for card in cards(page).locator("img").all()]
    assert len(names) > 3
    page.reload()
    cards(page).first.wait_for()
    assert [card.get_attribute("src") for card in cards(page).locator("img").all()] == names
    _, again = start(f"--out={folder}")
    response = page.request.get(again + names[0])
    assert response.headers["content-type"] == "image/png"
    assert response.body() == (folder / Path(names[0]).name).read_bytes()
    assert page.request.get(f"{again}/pictures/..%2f..%2fetc%2fpasswd").status == 404


def test_it_listens_to_this_machine_only_and_ends_at_an_interrupt(start):
    process, address = start()
    port = urlsplit(address).port
    assert urlsplit(address).hostname == "127.0.0.1"
    addresses = {each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in addresses - {"127.0.0.1"}:
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in process.stderr.read()
