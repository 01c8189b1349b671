"""A stage-I-shaped network of diffusers, fine-tuned here on the embedded data, goes back and draws there."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

from imagen_jax.convert.deepfloyd.importing import ImportConfig, import_deepfloyd  # noqa: E402
from imagen_jax.convert.deepfloyd.network import diffusers_config  # noqa: E402
from imagen_jax.training.config import load_config  # noqa: E402
from imagen_jax.training.export import export_pipelines  # noqa: E402
from imagen_jax.training.trainer import train  # noqa: E402


def held_out(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(line["held_out_loss"] for line in reversed(lines) if "held_out_loss" in line)


def test_fine_tuning_lowers_the_held_out_loss_and_goes_back(tmp_path, records_folder, text_encoder):
    from diffusers import IFPipeline, UNet2DConditionModel

    def config(*more):
        fields = [
            f"data.path={records_folder}",
            f"data.text_encoder={text_encoder}",
            "stage.network.text_width=16",
            "train.eval_split=test",
            *more,
        ]
        return load_config("deepfloyd/stage1.py:tiny", [f"--config.{each}" for each in fields])

    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(diffusers_config(config().stage.network, 16))
    with torch.no_grad():
        theirs.conv_out.weight.mul_(0.3)
    theirs.save_pretrained(tmp_path / "unet")
    model = tmp_path / "model"
    import_deepfloyd(
        ImportConfig(stage1=str(tmp_path / "unet"), text_encoder=str(text_encoder), out=str(model))
    )
    still = config("train.steps=1", "train.eval_every=1", "optimizer.learning_rate=1e-12")
    train(still, tmp_path / "still", init_from=str(model))
    train(config("train.eval_every=200"), tmp_path / "tuned", init_from=str(model))
    before, after = held_out(tmp_path / "still"), held_out(tmp_path / "tuned")
    assert before > 0.9 and after < 0.6 * before
    (name,) = export_pipelines([tmp_path / "tuned"], tmp_path / "out")
    pipeline = IFPipeline.from_pretrained(tmp_path / "out" / name)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        ["a red circle"], num_inference_steps=4, output_type="pt", clean_caption=False
    ).images.numpy()
    assert made.shape == (1, 3, 16, 16) and np.isfinite(made).all() and made.std() > 0.1
    weight = pipeline.unet.conv_out.weight.detach()
    assert not torch.equal(weight[:3], theirs.conv_out.weight[:3])
    assert torch.equal(weight[3:], theirs.conv_out.weight[3:])  # the variance half had no gradient
