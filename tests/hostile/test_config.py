"""Every field of a training config overridden by what it cannot be, and config files that are none."""

import pytest

from tests.hostile.mutations import HUGE, json_fields

COMMAND = ("train", "--config=config.py", "--workdir=out")
# Counts of what takes no memory, and texts that are not looked at before they are needed.
FREE = (
    *("seed", "steps", "max_skipped", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("keep_best", "sample_every", "eval_every", "eval_batches", "warmup_steps"),
    *("best_metric", "eval_split", "sample_split"),
)
OVERRIDES = {
    "a list": lambda good: ["[[]]"],
    "a text for a number": lambda good: ["x"] if isinstance(good, (int, float)) else [],
    "a number for a text": lambda good: ["7"] if isinstance(good, str) else [],
    "huge": lambda good: (
        [str(HUGE), str(10**30)] if isinstance(good, int) and not isinstance(good, bool) else []
    ),
    "not finite": lambda good: ["nan", "inf", "1e400", "-1e400"] if isinstance(good, float) else [],
    "deep": lambda good: ["(" * 5000 + ")" * 5000] if isinstance(good, str) else [],
    "half a character": lambda good: ["\udcff"] if isinstance(good, str) else [],
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_an_override(kind, place, run, monkeypatch):
    from imagen_jax.config import to_dict
    from imagen_jax.training.config import load_config

    faults = []
    for path, good in json_fields(to_dict(load_config("config.py"))):
        if not all(isinstance(name, str) for name in path) or isinstance(good, dict):
            continue
        field = ".".join(path)
        for value in OVERRIDES[kind](good):
            outcome = run(*COMMAND, f"--config.{field}={value}")
            if outcome.reached and path[-1] in FREE and value != str(10**30):
                continue
            # Of a group that the config leaves out an override asks for its kind first.
            if fault := outcome.fault(field, path[-1], ".".join(path[:-1]) or field, value[:50]):
                faults.append(f"{field}={value[:30]}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} fields", *faults])


CONFIGS = {
    "no Python": b"x = = 1\n",
    "not UTF-8": b"x = '\xff'\n",
    "NUL": b"x = '\0'\n",
    "empty": b"",
    "no function": b"get_config = 7\n",
    "no argument": b"def get_config(): return {}\n",
    "raises": b"raise KeyError('x')\n",
    "its function raises": b"def get_config(v): return {}['x']\n",
    "exits": b"import sys; sys.exit(3)\n",
    "imports what is not there": b"import nothing_of_this_name\n",
    "a number": b"def get_config(v): return 7\n",
    "None": b"def get_config(v): return None\n",
    "a list": b"def get_config(v): return [1]\n",
    "keys that are no texts": b"def get_config(v): return {1: 2}\n",
    "an empty group": b"def get_config(v): return {}\n",
    "a set": b"def get_config(v): return {'stage': {1, 2}}\n",
    "endless": b"def get_config(v): return get_config(v)\n",
    "deep": b"x = " + b"(" * 3000 + b")" * 3000 + b"\n",
    "deep group": b"def get_config(v):\n d = {}\n for _ in range(5000): d = {'stage': d}\n return d\n",
    "itself": b"def get_config(v):\n d = {}\n d['stage'] = d\n return d\n",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_file_that_is_none(kind, place, run):
    (place / "bad.py").write_bytes(CONFIGS[kind])
    for verb, flags in (("train", ("--workdir=out",)), ("plan", ("--topology=v5e:2x2",))):
        fault = run(verb, "--config=bad.py", *flags).fault("bad.py", "config")
        assert not fault, f"{verb}: {fault}"


@pytest.mark.parametrize(
    "argument",
    [
        "--config.",
        "--config.=1",
        "--config..=1",
        "--config.stage",
        "--config.stage=7",
        "--config.stage=None",
        "--config.stage.network={}",
        "--config.stage.network.kind=[1]",
        "--config.stage.network.kind={}",
        "--config.stage.network.channels=8",
        "--config.stage.network.channels=[8,8]",
        "--config.stage.network.channels=[]",
        "--config.stage.network.channels=[1000000000]",
        "--config.stage.network.num_res_blocks=[1000000000]",
        "--config.stage.network.channels=[-4]",
        "--config.stage.network.channels=[7]",
        "--config.stage.network.head_channels=3",
        "--config.stage.network.head_channels=0",
        "--config.data.path=",
        "--config.data.path=/dev/zero",
        "--config.data.path=like.png",
        "--config.data.split=../x",
        "--config.data.text_encoder=records",
        "--config.data.embeddings=records",
        "--config.train.steps=0x",
        "--config.train.steps=1_0.0",
        "--config.train.ema_decay=2.0",
        "--config.optimizer.learning_rate=-1.0",
        "--config.\x00=1",
        "--config.data.path=a\x00b",
        "extra",
        "--",
        "-7",
        "=",
    ],
)
def test_an_override_that_is_none(argument, run):
    names = [part for part in argument.lstrip("-").replace("\0", "").split("=")[0].split(".") if part]
    fault = run(*COMMAND, argument).fault(*(names or ["config", "unexpected", "argument"]))
    assert not fault, fault
