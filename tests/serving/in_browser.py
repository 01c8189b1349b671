"""What somebody does with the page in a browser."""

import io
import re

import numpy as np
from PIL import Image

from imagen_jax.serving.request import MAX_IMAGES

PATIENCE = 300_000  # milliseconds: the first picture waits for the compiler
PROMPT = "a red circle"
FOREIGN = "evil.example"  # a name that leads to this machine
LONG = {"base_steps": 1000, "Pictures": MAX_IMAGES}


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
