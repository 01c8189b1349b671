"""What all measurements on a GPU share: results that are kept as they come, times, memory and the costliest kernels."""

import dataclasses
import gzip
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from imagen_jax.plan.chips import device_peak_flops

KERNELS = 5  # costliest of a program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """One device's results, a file that grows."""

    folder: Path
    tiny: bool

    @property
    def name(self) -> str:
        """Of the device, as a file name."""
        kind = jax.devices()[0].device_kind
        return re.sub(r"[^A-Za-z0-9]+", "-", kind).strip("-") + ("-tiny" if self.tiny else "")

    def read(self) -> dict[str, Any]:
        """All results so far."""
        file = self.folder / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def add(self, part: str, values: dict[str, Any]) -> None:
        """Adds to a part's results, writes them at once, and says them."""
        print(f"  {json.dumps(values)}", flush=True)
        results = self.read()
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        results[part] = {**results.get(part, {}), **values, **versions}
        for name, text in (
            (f"{self.name}.json", json.dumps(results, indent=2)),
            (f"{self.name}.md", page(results)),
        ):
            file = self.folder / name
            file.with_suffix(file.suffix + ".new").write_text(text + "\n")
            file.with_suffix(file.suffix + ".new").replace(file)

    def begin(self, part: str) -> None:
        """Forgets a part's earlier results."""
        results = self.read()
        if results.pop(part, None) is not None:
            (self.folder / f"{self.name}.json").write_text(json.dumps(results, indent=2) + "\n")


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    device = next((part["device"] for part in results.values()), "")
    lines = [f"# {device}", "", "Measured by `benchmarks/gpu.sh`.", ""]
    for part, values in results.items():
        lines += [f"## {part}", "", "| | |", "| --- | --- |"]
        for name, value in values.items():
            if name == "kernels":
                value = "; ".join(f"{share:.0%} {kernel}" for kernel, share in value)
            elif isinstance(value, float):
                value = f"{value:.4g}"
            lines.append(f"| {name} | {value} |")
        lines.append("")
    return "\n".join(lines)


def seconds(
    run: Callable[[], Any], repeats: int = 10, wait: Callable[[Any], Any] = jax.block_until_ready
) -> float:
    """Median of the seconds until a call's result is there; it has been called before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_gib() -> float | None:
    """The most memory that this process has held on the device; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use", 0) / 2**30


def mfu(flops: float, second: float) -> float | None:
    """FLOPs over what the device could do in that time; None for a device whose peak is not known."""
    peak = device_peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops / (second * peak)


def kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """The costliest kernels of a call, and each one's share of the time of all; none where JAX records none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        spent: dict[str, float] = defaultdict(float)
        for file in Path(folder).rglob("*.trace.json.gz"):
            events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
            devices = {
                event["pid"]
                for event in events
                if event.get("name") == "process_name" and "GPU" in event["args"].get("name", "")
            }
            threads = {
                (event["pid"], event["tid"])
                for event in events
                if event.get("name") == "thread_name" and "Stream" in event["args"].get("name", "")
            }
            for event in events:
                place = event.get("pid"), event.get("tid")
                if event.get("ph") == "X" and place[0] in devices and place in threads:
                    spent[event["name"]] += event["dur"]
    total = sum(spent.values())
    return [(name, time / total) for name, time in sorted(spent.items(), key=lambda item: -item[1])[:KERNELS]]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
