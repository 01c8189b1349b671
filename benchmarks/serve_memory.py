"""Memory of `imagen-jax serve` over many settings and many clients, on the smallest network that there is.

    python benchmarks/serve_memory.py [--settings=300] [--clients=20] [--requests=300]

First a studio draws one picture with each of so many different settings, each of which is compiled: the memory of the
process and the cache on disk after a third of them and at the end. Then a server in a process of its own answers so
many requests of so many clients, each over its own page and websocket; its memory after a third of them, by when every
client has drawn, and at the end.
"""

import argparse
import asyncio
import html
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH = 16  # of the text embeddings
PROMPTS = ("a red circle", "a blue square", "two green triangles")


def make_model(folder: Path) -> Path:
    from imagen_jax.config import build
    from imagen_jax.models.configs import StageConfig
    from imagen_jax.models.stage import StageNetwork
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
    from imagen_jax.text.small import make_small_encoder

    network = {"kind": "unet", "channels": [4], "num_res_blocks": [1], "self_attention": [False]}
    network |= {"text_attention": [False], "head_channels": 4, "embedding_width": 8, "text_width": WIDTH}
    stage = {"name": "base", "resolution": 4, "max_text_length": 6, "network": network, "prediction": "v"}
    config = build(StageConfig, stage | {"sampling": {"sampler": {"steps": 2}}}, "stage")
    generator, params = np.random.default_rng(0), {}
    for name, leaf in StageNetwork(config).abstract_params.items():
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.2
        params[name] = scale * generator.standard_normal(leaf.shape).astype(np.float32)
    save_stage(folder, config, params)
    make_small_encoder(folder / "text_encoder", vocabulary_texts=PROMPTS, width=WIDTH, layers=1)
    save_index(folder, ModelIndex(stages=("base",), text_encoder="text_encoder"))
    return folder


def memory(process: int) -> float:
    """Resident memory in MB."""
    (line,) = (
        line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def on_disk(cache: Path) -> dict:
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {"files": len(files), "MB": round(sum(path.stat().st_size for path in files) / 2**20, 1)}


def draw_settings(model: Path, folder: Path, cache: Path, settings: int) -> list[dict]:
    from etils import epath

    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.overrides import SamplingOverrides
    from imagen_jax.serving.request import PictureRequest
    from imagen_jax.serving.studio import JobState, Studio

    studio, rows = Studio(Imagen.load(model, cache=str(cache)), epath.Path(folder)), []
    started = time.perf_counter()
    for number in range(1, settings + 1):
        weight = SamplingOverrides(guidance_weight=1.0 + number / 100)
        job = studio.submit(PictureRequest(prompt=PROMPTS[number % 3], seed=number, overrides=(weight,)))
        while not job.state.over:
            time.sleep(0.005)
        assert job.state is JobState.DONE, job.message
        if number % max(1, settings // 6) == 0:
            row = {"settings": number, "memory_MB": round(memory(os.getpid()), 1), "cache": on_disk(cache)}
            rows.append(row | {"seconds": round(time.perf_counter() - started)})
            print(row, file=sys.stderr, flush=True)
    studio.close()
    return rows


async def client(url: str, requests: list[int], done: list[int]) -> None:
    """One browser that opens a page for each picture, draws it and leaves."""
    import httpx

    async with httpx.AsyncClient(timeout=60) as http:
        for seed in requests:
            drawn = False
            while not drawn:  # a connection that a busy machine loses is the page's end: another is opened
                page = (await http.get(url, params={"prompt": PROMPTS[seed % 3], "seed": seed})).text
                (elements,) = re.findall(r"parseElements\(String\.raw`(.*?)`\)", page, re.DOTALL)
                for key, element in json.loads(html.unescape(elements)).items():
                    if element.get("props", {}).get("label") == "Draw":
                        drawn = await press(url, page, int(key), element["events"][0]["listener_id"])
            done.append(seed)


async def press(url: str, page: str, button: int, listener: str) -> bool:
    """Connects as the page's script does, presses the button and waits for the end; whether that was the picture."""
    import socketio

    (name,) = re.findall(r"[\"']client_id[\"']: ?[\"']([^\"']+)", page)
    connection, ended, seen = socketio.AsyncClient(reconnection=False), asyncio.Event(), []

    def update(message: dict) -> None:
        if "1 picture in" in json.dumps(message):
            seen.append(message)
            ended.set()

    connection.on("update", update)
    connection.on("disconnect", lambda *_: ended.set())
    tab = {"client_id": name, "tab_id": name, "document_id": name, "next_message_id": "0"}
    query = "&".join(f"{key}={value}" for key, value in (tab | {"implicit_handshake": "true"}).items())
    place = {"socketio_path": "/_nicegui_ws/socket.io", "transports": ["websocket"], "wait_timeout": 60}
    try:
        await connection.connect(f"{url}/?{query}", **place)
        event = {"id": button, "client_id": name, "listener_id": listener, "args": ["{}"]}
        await connection.emit("event", event)
        await asyncio.wait_for(ended.wait(), 300)
    except socketio.exceptions.ConnectionError:
        return False
    finally:
        await connection.disconnect()
    return bool(seen)


def serve_clients(model: Path, cache: Path, clients: int, requests: int) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "imagen_jax",
        "serve",
        f"--model={model}",
        "--port=0",
        f"--cache={cache}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        rows, done = [], []
        for part in range(6):
            seeds = np.arange(part * requests // 6, (part + 1) * requests // 6)

            async def all_clients(seeds=seeds):
                await asyncio.gather(
                    *(client(url, seeds[i::clients].tolist(), done) for i in range(min(clients, len(seeds))))
                )

            asyncio.run(all_clients())
            time.sleep(15)  # by when the pages that were left are gone
            rows.append({"requests": len(done), "memory_MB": round(memory(process.pid), 1)})
            print(rows[-1], file=sys.stderr, flush=True)
        return rows
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", type=int, default=300)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=300)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model")
        if args.requests:
            figures["requests"] = serve_clients(model, folder / "cache", args.clients, args.requests)
        if args.settings:
            figures["settings"] = draw_settings(model, folder, folder / "cache", args.settings)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
