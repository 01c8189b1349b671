"""The small encoder's pretraining: its loss against the formula, and that it learns what tells captions apart."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from imagen_jax.cli.main import main
from imagen_jax.data.shapes_captions import words
from imagen_jax.errors import UserError
from imagen_jax.models.t5_weights import hub_tensors, load_t5
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.pretraining import PretrainingConfig, contrastive_loss, pretrain
from imagen_jax.text.small import make_small_encoder
from tests.text.fake_job import png

SOURCE = "shapes:world=rich,language=both,resolution=32,siblings=yes,count=4000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_encoder(
        tmp_path_factory.mktemp("encoder"), vocabulary_texts=words(), width=32, layers=1, byte_fallback=True
    )


def test_the_loss_is_that_of_the_paper():
    random = np.random.default_rng(0)
    text, pictures = random.standard_normal((2, 5, 8))
    expected = []
    for i in range(5):
        cosines = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in pictures] for a in text])
        logits = np.exp(2.0) * cosines
        expected.append(np.log(np.exp(logits[i]).sum()) - logits[i, i])
        expected.append(np.log(np.exp(logits[:, i]).sum()) - logits[i, i])
    loss = contrastive_loss(
        jnp.asarray(text, jnp.float32), jnp.asarray(pictures, jnp.float32), jnp.asarray(2.0)
    )
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def test_the_scale_has_a_bound():
    vectors = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)
    most, more = (contrastive_loss(vectors, vectors[::-1], jnp.asarray(scale)) for scale in (4.6, 20.0))
    np.testing.assert_allclose(more, most, rtol=1e-6)


def test_tensors_go_back_under_the_hubs_names(folder):
    stored = load_file(folder / "model.safetensors")
    tensors = hub_tensors(*load_t5(folder))
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, stored[name])


def test_the_encoder_learns_which_picture_is_meant(folder, mixed_dtypes):
    caption = ["a small red circle on a white background"]
    before = TextEncoder.load(folder).encode(caption)[0]
    right = pretrain(folder, PretrainingConfig(source=SOURCE, steps=90, batch_size=32, learning_rate=3e-3))
    assert right > 0.1, right  # by chance 1 / 32
    after = TextEncoder.load(folder).encode(caption)[0]
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0.1


def test_a_source_without_pictures_is_refused(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="without a captioned picture"):
        pretrain(folder, PretrainingConfig(source=f"folder:{tmp_path}", steps=1))


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_nothing_is_not_a_number_of_steps(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PretrainingConfig(source=SOURCE, **{name: 0})


def test_another_encoder_is_not_pretrained(folder, tmp_path, capsys):
    arguments = ["--source=shapes:count=4", f"--text_encoder={folder}", f"--out={tmp_path}/records"]
    assert main(["precompute", *arguments, f"--pretrain_on={SOURCE}"]) != 0
    assert "--pretrain_on: goes with --make_small_encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pretrain_steps=7"], "--pretrain_steps=7: goes with --pretrain_on"),
        (
            [f"--pretrain_on={SOURCE}", "--pretrain_steps=0"],
            "--pretrain_steps: steps must be at least 1, got 0",
        ),
        (
            [f"--pretrain_on={SOURCE}", f"--pretrain_steps={10**10}"],
            "--pretrain_steps: steps must be at most",
        ),
    ],
)
def test_a_number_of_steps_that_means_nothing(flags, said, tmp_path, capsys):
    arguments = ["--source=shapes:count=4", f"--text_encoder={tmp_path}/encoder", f"--out={tmp_path}/records"]
    assert main(["precompute", *arguments, "--make_small_encoder", *flags]) != 0
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
