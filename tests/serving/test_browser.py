"""The page in the system's Chromium, as somebody uses it: `make test-browser`."""

import http.server
import io
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.sampling.pictures import METADATA_KEY
from imagen_jax.serving.request import MAX_STEPS
from tests.serving.in_browser import FOREIGN, PROMPT, cards, draw, pixels

pytestmark = pytest.mark.browser


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
