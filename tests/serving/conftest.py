"""A tiny cascade with random weights: fresh ones would draw the same picture of every prompt. And a browser."""

import re
import shutil
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from tests.serving.in_browser import FOREIGN, PATIENCE

TEXT_WIDTH = 16
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPTS = ("a red circle", "a blue square", "two green triangles")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, random_params):
    """A model folder of two guided stages of 2 steps each, "base" (8×8) and "sr" (16×16)."""
    from imagen_jax.config import build
    from imagen_jax.data.encoder_identity import EncoderIdentity
    from imagen_jax.models.configs import StageConfig
    from imagen_jax.sampling.identity import encoder_files
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
    from imagen_jax.text.small import make_small_encoder

    folder = tmp_path_factory.mktemp("models") / "model"
    for name, kind, resolution, low_resolution in (
        ("base", "unet", 8, None),
        ("sr", "efficient_unet", 16, 8),
    ):
        network = {
            "kind": kind,
            "channels": [8],
            "num_res_blocks": [1],
            "self_attention": [False],
            "text_attention": [True],
            "head_channels": 8,
            "embedding_width": 16,
            "text_width": TEXT_WIDTH,
        }
        values = {
            "name": name,
            "resolution": resolution,
            "low_resolution": low_resolution,
            "max_text_length": 6,
            "network": network,
            "prediction": "v",
            "sampling": {"sampler": {"steps": 2}},
        }
        stage = build(StageConfig, values, name)
        save_stage(folder, stage, random_params(stage))
    make_small_encoder(folder / "text_encoder", vocabulary_texts=PROMPTS, width=TEXT_WIDTH, layers=1)
    # Known by its files alone: nothing has to be encoded for it.
    known = EncoderIdentity(width=TEXT_WIDTH, tokenizer="", sketches=())
    files = encoder_files(folder / "text_encoder")
    index = ModelIndex(stages=("base", "sr"), text_encoder="text_encoder", encoder=known, encoder_files=files)
    save_index(folder, index)
    return folder


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
