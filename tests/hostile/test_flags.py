"""Every flag of every verb with values that it cannot mean: one line that names the flag."""

import os

import pytest

from tests.hostile.conftest import WITH_PAGE
from tests.hostile.mutations import BAD_REAL, BAD_TEXT, BAD_WHOLE

VERBS = {
    "precompute": ("--source=folder:pictures", "--text_encoder=encoder", "--out=out"),
    "train": ("--config=config.py", "--workdir=out"),
    "export": ("--from=run", "--out=out"),
    "import": ("deepfloyd", "--stage1=pipeline", "--out=out"),
    "sample": ("a red circle", "--model=model", "--out=out"),
    "plan": ("--config=config.py", "--topology=v5e:2x2"),
    "serve": ("--model=model", "--port=0"),
    "quickstart": ("--out=out", "--scale=smoke"),
}
# Texts of these flags name files or folders that are written, or are free: what is not refused is meant.
FREE = ("negative_prompt", "wandb", "variant", "name", "cache", "out", "workdir", "json")
# Sampling flags are texts that hold numbers, one for all stages or one a stage.
NUMBERS = ("steps", "eta", "churn", "guidance", "guidance_rescale", "percentile", "aug_level", "rows")
# What is odd, but can be meant.
MEANT = {
    ("--seed", str(10**9)),
    ("--limit", str(10**9)),
    ("--guidance", "-7"),
    ("--churn", str(10**9)),
    ("--allow_host", "x" * 5000),
}


def _flags(verb):
    """(flag, values that it cannot mean) of a verb."""
    from imagen_jax.cli.main import verb_parser

    for action in verb_parser(verb)._actions:
        flag = next((each for each in action.option_strings if each.startswith("--")), None)
        if flag is None or action.nargs == 0 or action.dest in ("help", "debug"):
            continue
        if action.type is int:
            yield flag, BAD_WHOLE
        elif action.type is float:
            yield flag, BAD_REAL
        elif action.choices:
            yield flag, ("x", "")
        elif action.dest in NUMBERS:
            yield flag, (*BAD_REAL, str(10**9), "1,2,3", "1,,", "--")
        elif action.dest not in FREE:
            yield flag, BAD_TEXT


NEEDS_PAGE = pytest.mark.skipif(not WITH_PAGE, reason="needs imagen_jax[serve]")


def verbs(table):
    return [pytest.param(verb, marks=NEEDS_PAGE) if verb == "serve" else verb for verb in table]


@pytest.mark.parametrize("verb", verbs(VERBS))
def test_a_flag_that_means_nothing(verb, run):
    faults = []
    for flag, values in _flags(verb):
        for value in values:
            rest = [each for each in VERBS[verb] if not each.startswith(f"{flag}=")]
            outcome = run(verb, *rest, f"{flag}={value}")
            if outcome.reached and (flag, value) in MEANT:
                continue
            name = flag.removeprefix("--")
            if fault := outcome.fault(flag, name, name.removeprefix("guidance_"), value[:80] or flag):
                faults.append(f"{flag}={value[:40]!r}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} of {verb}", *faults])


PATHS = {
    "precompute": ("--text_encoder", "--out"),
    "train": ("--config", "--workdir", "--init_from", "--reproduce"),
    "export": ("--from", "--out", "--text_encoder"),
    "import": ("--stage1", "--stage2", "--text_encoder", "--out"),
    "sample": ("--model", "--out", "--like", "--prompts_file", "--cache"),
    "plan": ("--config", "--json"),
    "serve": ("--model", "--out", "--cache"),
    "quickstart": ("--out",),
}


@pytest.mark.parametrize("verb", verbs(PATHS))
def test_a_path_that_is_of_another_kind(verb, place, run):
    (place / "file").write_text("x")
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")
    (place / "empty").mkdir()
    faults = []
    for flag in PATHS[verb]:
        written = flag in ("--out", "--workdir", "--json", "--cache")
        values = ["file", "pipe", "loop", "/dev/zero/x", "x" * 300]
        values += (
            ["file/below"] if written else ["missing", "empty", "pictures", "http://a/x", "gopher://x/y"]
        )
        if flag == "--json":
            values = ["file/below", "empty", "missing/x"]
        if flag == "--prompts_file":
            values.remove("file")
        for value in values:
            rest = [each for each in VERBS[verb] if not each.startswith(f"{flag}=")]
            outcome = run(verb, *rest, f"{flag}={value}")
            if fault := outcome.fault(flag, value[:200], value.partition("://")[0] + "://"):
                faults.append(f"{flag}={value[:40]!r}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} of {verb}", *faults])
