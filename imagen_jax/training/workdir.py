"""Taking a work directory for a run: it is nobody else's, and of the same config and text encoder."""

import contextlib
from collections.abc import Iterator

from etils import epath

from imagen_jax.data.encoder_identity import EncoderIdentity
from imagen_jax.parallel.processes import on_first
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.config_file import check_same_config, write_config
from imagen_jax.training.init_from import recorded_source
from imagen_jax.training.lock import WorkdirLock
from imagen_jax.training.run_encoder import check_encoder, recorded_encoder


def _start_workdir(config: TrainConfig, workdir: epath.Path, encoder: EncoderIdentity | None) -> WorkdirLock:
    """Takes the work directory for this run; process 0's part."""
    if (workdir / "config.json").exists():
        before = recorded_encoder(workdir)
        same = before is not None and encoder is not None and not before.differences(encoder)
        check_same_config(workdir, config, same_encoder=same)
        check_encoder(workdir, config.data, before, encoder)
        recorded_source(workdir)  # a spoilt record is refused before anything is written
    lock = WorkdirLock(workdir)
    if not lock.held:
        print(
            f"{workdir}: nothing keeps a second run out of a cloud folder; see that there is none", flush=True
        )
    try:
        write_config(workdir, config)
    except BaseException:
        lock.close()
        raise
    return lock


@contextlib.contextmanager
def taken_workdir(
    config: TrainConfig, workdir: epath.Path, encoder: EncoderIdentity | None
) -> Iterator[None]:
    """The work directory is this run's; refused on all processes if process 0 does not get it.

    Args:
      config: the run.
      workdir: its folder.
      encoder: the text encoder of its data; None: not known.

    Raises:
      UserError: another run holds the folder, or it is of another config or text encoder.
    """
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.callback(_start_workdir(config, workdir, encoder).close)

        on_first(take)
        yield
