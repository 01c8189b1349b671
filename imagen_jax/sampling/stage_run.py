"""All pictures of a group through one stage, batch by batch."""

import dataclasses

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from tqdm import tqdm

from imagen_jax.limits import shown
from imagen_jax.models.network import Params
from imagen_jax.models.text_form import Text
from imagen_jax.sampling.batches import Watcher, first_not_finite, run_batch
from imagen_jax.sampling.drawing import Drawing, StagePlan
from imagen_jax.sampling.inputs import StageInputs, not_finite
from imagen_jax.sampling.programs import HookShapes, ProgramSpec, StageProgram


def program_spec(plan: StagePlan, *, batch_size: int, pictures: int, mesh: Mesh | None) -> ProgramSpec:
    """The program that draws so many pictures of a stage, in batches.

    Args:
      plan: the stage's.
      batch_size: pictures drawn at a time, at most.
      pictures: in all.
      mesh: the stage's.
    """
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return ProgramSpec(
        stage=plan.stage,
        sampling=plan.sampling,
        batch=-(-min(batch_size, pictures) // parts) * parts,
        negative=plan.sampling.guidance_weight != 1.0,
        picture=plan.begins_with_picture,
        mesh=mesh,
        size=plan.size,
        hooks=HookShapes.of(plan.batch_hooks(np.zeros(1, int))),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRun:
    """A group of pictures in front of a stage."""

    drawing: Drawing  # the group's part of it
    plan: StagePlan
    program: StageProgram
    params: Params
    text: Text  # of each picture's prompt
    negative: Text | None  # of a batch

    def _inputs(self, begin: int, low_res: np.ndarray | None) -> StageInputs:
        """A batch, filled up from the front."""
        count, spec = len(self.drawing.wanted), self.program.spec
        chosen = np.arange(begin, begin + spec.batch) % count
        seeds = np.array([seed for _, seed in self.drawing.wanted], np.uint32)
        return StageInputs(
            seeds=seeds[chosen],
            text=self.text.embeddings[chosen],
            mask=self.text.mask[chosen],
            low_res=None if low_res is None else low_res[chosen],
            negative_text=None if self.negative is None else self.negative.embeddings,
            negative_mask=None if self.negative is None else self.negative.mask,
            picture=self.plan.pictures(chosen) if spec.picture else None,
            hooks=self.plan.batch_hooks(chosen),
        )

    def __call__(
        self,
        low_res: np.ndarray | None,
        good: Bool[np.ndarray, " pictures"],
        watcher: Watcher,
        *,
        leave: bool,
    ) -> tuple[Float[np.ndarray, "pictures height width channels"], list[str]]:
        """The stage's pictures in [−1, 1].

        Those that are not finite are taken out of `good`, and a line says of each where it went wrong; they go on
        as grey, so that the others keep their places.

        Args:
          low_res: pictures of the stage before, in [−1, 1]; None: a base.
          good: which pictures are finite so far.
          watcher: is shown what forms.
          leave: whether the progress bar stays when it is full.
        """
        wanted, spec = self.drawing.wanted, self.program.spec
        calls, starts = spec.sampling.sampler.network_calls, range(0, len(wanted), spec.batch)
        batches, faults = [], list[str]()
        with tqdm(
            total=calls * len(starts),
            unit="step",
            desc=spec.stage.name,
            disable=not watcher.progress,
            leave=leave,
        ) as bar:
            for begin in starts:
                inputs, count = self._inputs(begin, low_res), min(spec.batch, len(wanted) - begin)
                x0 = run_batch(
                    self.program, self.params, inputs, count, progress=bar, preview=watcher.preview
                )
                bad = not_finite(x0)
                if bad.any():
                    first = first_not_finite(self.program, self.params, inputs, count)
                    faults += [
                        f"stage {spec.stage.name!r} gave numbers that are not finite at call {first[i]} of {calls} for "
                        f"{shown(wanted[begin + i][0])} (seed {wanted[begin + i][1]})"
                        for i in np.flatnonzero(bad & good[begin : begin + count])
                    ]
                    good[begin : begin + count] &= ~bad
                    x0 = np.where(bad[:, None, None, None], np.float32(0.0), x0)
                batches.append(np.clip(x0, -1.0, 1.0))
        return np.concatenate(batches), faults
