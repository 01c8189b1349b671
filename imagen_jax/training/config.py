"""The fields of a training config, their defaults and meaning."""

import ast
import dataclasses
import enum
import importlib.util
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ml_collections

import imagen_jax
from imagen_jax.config import ANY, build
from imagen_jax.diffusion.losses import LossConfig
from imagen_jax.diffusion.noise_levels import NoiseLevels, UniformTime
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_BATCH, MAX_PICTURES, MAX_SEED, MAX_SIDE, MAX_THREADS, check_numbers
from imagen_jax.models.configs import StageConfig
from imagen_jax.parallel.mesh import MeshConfig
from imagen_jax.sizes import Size
from imagen_jax.training.text_width import fill_text_width


class Optimizer(enum.StrEnum):
    """The update rule."""

    ADAM = "adam"
    ADAFACTOR = "adafactor"


class Decay(enum.StrEnum):
    """What the learning rate does after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    INVERSE_SQRT = "inverse_sqrt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    kind: Optimizer = Optimizer.ADAM  # Imagen: adafactor for the base, adam for the SR stages
    learning_rate: float = 1e-4  # peak; Imagen: 1e-4
    warmup_steps: int = 10_000  # linear from 0 to the peak
    decay: Decay = Decay.COSINE  # to 0 at train.steps; inverse_sqrt: peak · √(warmup_steps / step)
    b1: float = 0.9  # Adam's first moment
    b2: float = 0.999  # Adam's second moment
    eps: float = 1e-8  # Adam's ε
    clip_norm: float | None = 1.0  # largest global gradient norm; None: unclipped

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("eps", "clip_norm"):
            if (value := getattr(self, name)) is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive, got {value}")
        check_numbers(self, learning_rate=10.0, eps=1.0)


class TextDtype(enum.StrEnum):
    """Precision of a text encoder that runs beside the training."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the training examples come from."""

    path: str  # folder of records that `imagen-jax precompute` wrote
    embeddings: str | None = None  # folder of `precompute --embeddings_only`, by key; None: those in `path`
    text_encoder: str | None = None  # folder or hub id: encodes captions while training; None: stored ones
    text_dtype: TextDtype = TextDtype.FLOAT32  # of that encoder's weights, products and embeddings
    split: str = "train"  # of the records
    size: tuple[int, ...] | None = (
        None  # width, height in pixels of the pictures; None: stage.resolution, square
    )
    batch_size: int = 2048  # examples a step, over all devices and processes
    flip: bool = False  # mirror pictures at random; captions with left and right forbid it
    num_threads: int = 16  # threads that decode and resize
    prefetch: int = 2  # batches made ahead

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        for name in ("num_threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_numbers(
            self, batch_size=MAX_BATCH, num_threads=MAX_THREADS, prefetch=MAX_THREADS, size=MAX_SIDE
        )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be width and height in pixels, got {self.size}")
        if self.embeddings is not None and self.text_encoder is not None:
            raise ValueError(
                f"embeddings={self.embeddings} and text_encoder={self.text_encoder} exclude each other; "
                "set one of them to None"
            )


class OnNonfinite(enum.StrEnum):
    """What a loss or gradient that is not finite leads to."""

    STOP = "stop"
    SKIP = "skip"


class Scorer(enum.StrEnum):
    """Who judges the pictures of a sample grid by their captions."""

    NONE = "none"
    ORACLE = "oracle"


class Best(enum.StrEnum):
    """Which values of a metric are good."""

    LOWEST = "lowest"
    HIGHEST = "highest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, and what to write on the way."""

    RETIRED: ClassVar[dict[str, Any]] = {"tpu_operation_kib": ANY}

    steps: int  # optimizer steps in all
    text_dropout: float = 0.1  # probability of the null text (classifier-free guidance)
    accumulate: int = 1  # parts of a batch that go through the network one after the other; memory for time
    ema_decay: float = 0.9999  # of the averaged weights; reached as (1 + step) / (10 + step)
    ema_decays: tuple[float, ...] = ()  # of further averages kept beside it; `export --ema_decay` chooses
    on_nonfinite: OnNonfinite = OnNonfinite.STOP  # at a loss or gradient that is not finite; skip: no update
    max_skipped: int = 10  # steps that a run may skip in all before it stops
    log_every: int = 100  # steps between lines of metrics.jsonl
    checkpoint_every: int = 5000  # steps between checkpoints
    keep_checkpoints: int = 3  # newest checkpoints kept
    keep_every: int | None = None  # steps: checkpoints at multiples of this are kept for ever; None: none
    keep_best: int = 0  # checkpoints kept because their metric is the best
    best_metric: str = "loss"  # name in metrics.jsonl: its last value before a checkpoint
    best_is: Best = Best.LOWEST  # values of that metric that are good
    watchdog_seconds: float = 1800.0  # without a step, after which the command ends all processes; 0: never
    sample_every: int = 5000  # steps between sample grids; 0: none
    sample_count: int = 16  # pictures of a sample grid, of the first captions of the split
    sample_split: str | None = (
        None  # split whose captions (and low-resolution pictures) are used; None: data.split
    )
    sample_prompts: tuple[str, ...] = ()  # instead of the split's captions; encoded by the records' encoder
    sample_base: str | None = None  # model folder that draws what an SR stage enlarges; None: true pictures
    sample_score: Scorer = Scorer.NONE  # of each grid's pictures; oracle reads those of the embedded data
    eval_every: int = (
        0  # steps between looks at the loss of held-out records, by the averaged weights; 0: none
    )
    eval_split: str = "test"  # their split
    eval_batches: int = 4  # batches of data.batch_size, the same examples and noise every time

    def __post_init__(self) -> None:
        check_numbers(self, sample_count=MAX_PICTURES, accumulate=MAX_BATCH)
        at_least_one = ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "sample_count")
        for name in (*at_least_one, "accumulate", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every must be at least 1 or None, got {self.keep_every}")
        for name in ("keep_best", "watchdog_seconds", "sample_every", "eval_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("text_dropout", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not all(0.0 <= decay <= 1.0 for decay in self.ema_decays):
            raise ValueError(f"ema_decays must be in [0, 1], got {self.ema_decays}")
        if len({self.ema_decay, *self.ema_decays}) <= len(self.ema_decays):
            raise ValueError(
                f"ema_decay {self.ema_decay} and ema_decays {self.ema_decays} must differ from each other"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of one stage: network × schedule × prediction × loss × optimizer × data."""

    stage: StageConfig  # what is trained: network, schedule, prediction
    data: DataConfig  # on which examples
    train: LoopConfig  # for how long, and what is written on the way
    seed: int = 0  # of initial weights, order of examples, times, noise and dropout
    loss: LossConfig = LossConfig()  # which error is made small
    noise_levels: NoiseLevels = UniformTime()  # at which it is measured
    optimizer: OptimizerConfig = OptimizerConfig()  # by which rule, at which rate
    mesh: MeshConfig = MeshConfig()  # on which arrangement of devices

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        check_numbers(self, seed=MAX_SEED)
        if self.data.size is not None:
            self.stage.check_size(self.size)
            if self.stage.crop is not None and self.stage.crop > min(self.size):
                raise ValueError(f"stage.crop {self.stage.crop} is larger than data.size {self.size}")

    @property
    def size(self) -> Size:
        """Of the pictures that crops are taken of."""
        if self.data.size is None:
            return self.stage.size
        width, height = self.data.size
        return Size(height, width)

    @property
    def step_size(self) -> Size:
        """Of the pictures that the training step sees."""
        crop = self.stage.crop
        return self.size if crop is None else Size(crop, crop)

    def check_trainable(self) -> None:
        """Raises UserError for a network that can draw pictures but not be trained."""
        if self.stage.network.param_dtype != "float32":
            raise UserError(
                f"config.stage.network.param_dtype={self.stage.network.param_dtype}: must be float32 to train"
            )


# Fields that may differ between a run and its resumption: they change neither the weights (the mesh and the parts
# of a batch: but for rounding) nor the data. Of the text's fields none is here: another encoder's embeddings look
# alike and mean something else, see `RENAMEABLE`.
RESUMABLE = (
    "config.mesh",
    "config.data.path",
    "config.data.num_threads",
    "config.data.prefetch",
    "config.train.log_every",
    "config.train.checkpoint_every",
    "config.train.keep_checkpoints",
    "config.train.keep_every",
    "config.train.keep_best",
    "config.train.best_metric",
    "config.train.best_is",
    "config.train.watchdog_seconds",
    "config.train.sample_every",
    "config.train.sample_count",
    "config.train.sample_split",
    "config.train.sample_prompts",
    "config.train.sample_base",
    "config.stage.network.attention",
    "config.stage.network.gather",
    "config.stage.network.remat",
    "config.train.sample_score",
    "config.train.accumulate",
    "config.train.on_nonfinite",
    "config.train.max_skipped",
    "config.train.eval_every",
    "config.train.eval_split",
    "config.train.eval_batches",
    "config.stage.sampling",
)

# And those that may name another place of the same text encoder, or of its embeddings; not: none before, or none now.
RENAMEABLE = ("config.data.text_encoder: '", "config.data.embeddings: '")


def find_config_file(name: str) -> Path:
    """A config file by path, or by its path below the installed `configs` folder ("imagen/base64.py").

    Raises:
      UserError: if there is none, naming the flag.
    """
    package = Path(imagen_jax.__file__).parent
    candidates = [Path(name), package.parent / "configs" / name, package / "configs" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"--config: no file {name!r}, here or below the installed configs/")


def parse_override(argument: str) -> tuple[list[str], Any]:
    """Splits "--config.a.b=value" into its path and its value; a value that is no literal is a string.

    Raises:
      UserError: if the argument is not of that form.
    """
    flag, equals, text = argument.partition("=")
    if not flag.startswith("--config.") or not equals:
        raise UserError(f"unexpected argument {argument!r}; overrides are --config.some.field=value")
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (
        ValueError,
        TypeError,
        SyntaxError,
        MemoryError,
        RecursionError,
    ):  # all that Python says of such texts
        value = text
    return flag.removeprefix("--config.").split("."), value


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets the overridden fields in a nested dictionary; `build` checks their names and types after."""
    for argument in overrides:
        path, value = parse_override(argument)
        group: Any = values
        for name in path[:-1]:
            if group.get(name) is None:
                group[name] = {}
            group = group[name]
            if not isinstance(group, dict):
                raise UserError(f"{argument.partition('=')[0]}: {name} is a field, not a group")
        group[path[-1]] = value
    return values


def load_config(spec: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Runs a config file's `get_config(variant)` and checks the result with the overrides applied.

    A `stage.network.text_width` that it leaves out is that of the run's embeddings.

    Args:
      spec: "FILE" or "FILE:variant".
      overrides: arguments "--config.some.field=value".

    Raises:
      UserError: for a missing file, an unknown variant, an unknown field (with the nearest name), a value of
        the wrong type, or a text width that neither it nor its data tell.
    """
    name, _, variant = spec.partition(":")
    file = find_config_file(name)
    module_spec = importlib.util.spec_from_file_location("imagen_jax_user_config", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config: {file} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"--config: {file} has no function get_config(variant)")
        values = module.get_config(variant)
        if isinstance(values, ml_collections.ConfigDict):
            values = values.to_dict()
        if not isinstance(values, Mapping):
            raise UserError(f"--config {spec}: get_config must return a dictionary, got {values!r:.80}")
        plain = _plain(values)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config: {file}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"--config {spec}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever its code may raise
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
        ]
        line = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--config: {file}{line}: {type(error).__name__}: {error}") from error
    values = apply_overrides(plain, overrides)
    fill_text_width(values)
    return build(TrainConfig, values, "config")


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested dictionaries of any class as plain ones with texts as keys."""
    return {
        str(name): _plain(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }
