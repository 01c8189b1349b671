"""Numbers that nobody means: refused in one line, wherever a config, a record or a flag brings them."""

import copy
import dataclasses
import json
import math

import jax
import pytest

from imagen_jax.cli.main import main
from imagen_jax.config import build, to_dict
from imagen_jax.diffusion.guidance import GuidanceConfig
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule
from imagen_jax.errors import UserError
from imagen_jax.limits import check_numbers
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.deepfloyd import DeepFloydUNetConfig
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.levels import LevelsConfig
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.t5 import T5Config
from imagen_jax.models.unet import UNetConfig
from imagen_jax.sampling.drawing import wanted_pictures
from imagen_jax.sampling.overrides import override_all, parse_overrides
from imagen_jax.sampling.record import PictureRecord, StageRecord
from imagen_jax.training.config import load_config


def leaves(values, path=()):
    """(path, value) of every number in nested dictionaries and lists."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaves(value, (*path, name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from leaves(value, (*path, number))
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path, values


def replaced(values, path, value):
    values = copy.deepcopy(values)
    group = values
    for name in path[:-1]:
        group = group[name]
    group[path[-1]] = value
    return values


RECORD = PictureRecord(
    prompt="a cat",
    seed=3,
    stages=(StageRecord(name="base", identity="x", sampling=SamplingConfig()),),
    text_encoder="x",
    model="model",
)
T5 = T5Config(vocab_size=8, width=4, head_dim=2, num_heads=2, feed_forward_width=8, num_layers=1)
CONFIGS = {
    **{spec: load_config(spec) for spec in ("imagen/base64.py", "imagen/sr1024.py", "deepfloyd/stage2.py")},
    "record": RECORD,
    "t5": T5,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_number_of_a_config_is_unbounded(name):
    """Every number of it in turn, those of groups and lists included; the message names the field."""
    config = CONFIGS[name]
    values = to_dict(config)
    assert build(type(config), values, "config") == config
    seen = 0
    for path, value in leaves(values):
        if path == ("format",):
            continue
        for bad in (2**33, -(10**400)) if isinstance(value, int) else (-1e300, 10**400, math.nan, math.inf):
            with pytest.raises(UserError) as caught:
                build(type(config), replaced(values, path, bad), "config")
            message = str(caught.value)
            field = next(part for part in reversed(path) if isinstance(part, str))
            assert field in message or "mesh axes" in message, (path, bad, message)
            assert "\n" not in message and len(message) < 300
            seen += 1
    assert seen >= 20


def test_json_that_python_alone_reads_is_refused():
    values = to_dict(CONFIGS["record"])
    text = json.dumps(values).replace('"guidance_weight": 1.35', '"guidance_weight": NaN')
    with pytest.raises(
        UserError, match=r"stages\[0\].sampling.guidance_weight must be a finite number, got nan"
    ):
        build(PictureRecord, json.loads(text), "record")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SamplingConfig(guidance_weight=math.nan),
            "guidance_weight must be a finite number, got nan",
        ),
        (lambda: SamplingConfig(guidance_weight=1e300), r"guidance_weight must be at most 1000, got 1e\+300"),
        (lambda: SamplerConfig(steps=10**9), "steps must be at most 100000, got 1000000000"),
        (lambda: SamplerConfig(churn=math.inf), "churn must be 0 or more, got inf"),
        (lambda: LinearSchedule(log_snr_max=-1e5), "log_snr_max must be at least -200, got -100000.0"),
        (lambda: CosineSchedule(shift=math.inf), "shift must be a finite number, got inf"),
        (lambda: GuidanceConfig(log_snr_min=math.nan), "log_snr_min must be a finite number, got nan"),
        (lambda: wanted_pictures(["x"], 0, 10**9), "num_images 1000000000 of 1 prompts: more than 100000"),
        (
            lambda: wanted_pictures(["x"], 10**5000, 1),
            "seeds must lie in 0 … 4294967295, got a number of about 5000",
        ),
    ],
)
def test_settings_made_in_python_have_the_same_bounds(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("flag", ["guidance", "eta", "churn", "percentile", "aug_level", "guidance_interval"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300", "1e400", "9" * 400])
def test_flags_have_the_same_bounds(flag, text):
    given = f"{text}:" if flag == "guidance_interval" else text
    with pytest.raises(UserError) as caught:
        override_all([SamplingConfig()], parse_overrides({flag: given}, 1))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("flag", ["steps", "guidance_oscillate"])
@pytest.mark.parametrize("text", ["1000000000000", "-1000000000000", "9" * 5000])
def test_counts_of_flags_have_bounds(flag, text):
    if flag == "guidance_oscillate" and text.startswith("-"):
        return  # never
    with pytest.raises(UserError) as caught:
        override_all([SamplingConfig()], parse_overrides({flag: text}, 1))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["precompute", "--source=shapes:count=8", "--text_encoder=x", "--max_length=1000000000"],
        ["precompute", "--source=shapes:count=8", "--text_encoder=x", "--num_shards=1000000000"],
        ["precompute", "--source=shapes:count=8", "--text_encoder=x", "--num_processes=1000000000"],
        ["precompute", "--source=shapes:count=1000000000", "--text_encoder=x"],
        ["precompute", f"--source=shapes:count={'9' * 5000}", "--text_encoder=x"],
        ["precompute", "--source=shapes:resolution=1000000000", "--text_encoder=x"],
        ["plan", "--config=shapes/base16.py", "--topology=v5e:1000000000x1000000000"],
        ["plan", "--config=shapes/base16.py", f"--topology=v5e:{'9' * 5000}x1"],
        ["plan", "--config=shapes/base16.py", "--topology=v5e:1x1", "--batch_size=1000000000"],
        ["train", "--config=shapes/base16.py", "--config.data.batch_size=1000000000"],
        ["train", "--config=shapes/base16.py", "--config.optimizer.learning_rate=1e400"],
        ["train", "--config=shapes/base16.py", f"--config.train.steps={'9' * 5000}"],
        ["train", "--config=shapes/base16.py", "--config.stage.network.head_channels=7"],
        ["train", "--config=shapes/base16.py", "--cpu_devices=1000000000"],
        ["train", "--config=shapes/base16.py", "--peer_timeout=nan"],
    ],
)
def test_commands_refuse_in_one_line(arguments, tmp_path, capsys):
    out = {"precompute": ["--out"], "train": ["--workdir"]}.get(arguments[0], [])
    assert main([*arguments, *(f"{flag}={tmp_path / 'out'}" for flag in out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"imagen-jax {arguments[0]}: error: ") and len(line) < 400
    assert not (tmp_path / "out").exists()


SIZES = {"num_res_blocks": (1,), "self_attention": (True,), "text_attention": (True,), "text_width": 16}
DEEPFLOYD = {"text_channels": 8, "pool_heads": 4, "norm_groups": 4, "text_norm_groups": 4}


@pytest.mark.parametrize(
    ("cls", "sizes", "options", "message"),
    [
        (UNetConfig, {"head_channels": 8, "embedding_width": 20}, None, None),
        (UNetConfig, {"head_channels": 3}, None, "head_channels 3 does not divide 8 channels of level 0"),
        (EfficientUNetConfig, {"head_channels": 3}, None, "head_channels 3 does not divide 8 channels"),
        (
            UNetConfig,
            {
                "self_attention": (False,),
                "text_attention": (False,),
                "head_channels": 3,
                "embedding_width": 20,
            },
            None,
            "6 heads, which pool the text, do not divide embedding_width 20",
        ),
        (UNetConfig, {"head_channels": 4}, {}, None),
        (
            UNetConfig,
            {"head_channels": 4},
            {"norm_groups": 3},
            "norm_groups 3 does not divide 8 channels",
        ),
        (UNetConfig, {"head_channels": 4}, {"pool_heads": 3}, "3 heads, which pool .*text_width 16"),
        # The middle block attends, whatever the levels do.
        (UNetConfig, {"text_attention": (False,), "head_channels": 3}, {}, "head_channels 3 does not divide"),
    ],
)
def test_a_config_refuses_what_the_network_refuses(monkeypatch, cls, sizes, options, message):
    def make():
        fields = {"channels": (8,), **SIZES, **sizes}
        return cls(**fields) if options is None else DeepFloydUNetConfig(**fields, **DEEPFLOYD | options)

    def build_network(network):
        low = 8 if network.low_res_channels else None
        padded = not network.SEES_MASK
        stage = StageConfig(name="x", resolution=16, low_resolution=low, network=network, padded_text=padded)
        return StageNetwork(stage).abstract_params

    if message is None:
        assert build_network(make())
        return
    with pytest.raises(ValueError, match=message):
        make()
    for kind in (LevelsConfig, DeepFloydUNetConfig):
        monkeypatch.setattr(kind, "_check_buildable", lambda self: None)
    with pytest.raises(ValueError, match="divide"):
        build_network(make())


def test_the_rule_sees_every_number():
    @dataclasses.dataclass(frozen=True)
    class Config:
        count: int = 1
        share: float = 0.5
        sizes: tuple[float, ...] = (1.0,)
        name: str = "x"
        on: bool = True
        nothing: int | None = None

    check_numbers(Config())
    check_numbers(Config(count=5), count=5)
    for bad in ({"count": 6}, {"count": -6}, {"sizes": (1.0, math.inf)}, {"share": math.nan}, {"share": 2e9}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            check_numbers(Config(**bad), count=5)
    assert jax.dtypes.canonicalize_dtype("int64") == "int32"  # what MAX_COUNT is about
