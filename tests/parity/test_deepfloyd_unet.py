"""DeepFloyd's networks against diffusers, on random weights in files that diffusers wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

from imagen_jax.convert.deepfloyd.network import diffusers_config, unet_config, unet_sources  # noqa: E402
from imagen_jax.models.weights import WeightReader, flatten_names, load_tensors  # noqa: E402

NAMES = ("dummy-1", "dummy-2", "stage-1", "stage-2", "odd")


def load(folder):
    """Our network with the weights of a folder."""
    config = unet_config(json.loads((folder / "config.json").read_text()))
    graph, abstract = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    sources = unet_sources(flatten_names(abstract)[0])
    with WeightReader(folder) as reader:
        assert {source.names[0] for source in sources.values()} == reader.names
        return config, nnx.merge(graph, load_tensors(abstract, reader, sources))


def inputs_of(config, side, batch=2, length=77):
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal((batch, side, side, 3 + config.low_res_channels)).astype(np.float32),
        "time": np.array([7.0, 903.0], np.float32)[:batch],
        "text": generator.standard_normal((batch, length, config.text_width)).astype(np.float32),
        "aug": np.array([250.0, 3.0], np.float32)[:batch] if config.low_res_channels else None,
    }


def run_theirs(unet, given):
    def tensor(name):
        return None if given[name] is None else torch.from_numpy(given[name])

    with torch.no_grad():
        output = unet(
            tensor("x").permute(0, 3, 1, 2), tensor("time"), tensor("text"), class_labels=tensor("aug")
        ).sample
    return output.permute(0, 2, 3, 1).numpy()


def run_ours(network, given):
    x, low_res = given["x"][..., :3], given["x"][..., 3:]
    mask = jnp.ones(given["text"].shape[:2], bool)
    return jax.jit(
        lambda x, time, text, low_res, aug: network(x, time, text, mask, low_res=low_res, aug_time=aug)
    )(x, given["time"], given["text"], low_res if low_res.shape[-1] else None, given["aug"])


@pytest.mark.parametrize("name", NAMES)
def test_network_matches_diffusers(name, unet_folder):
    theirs, folder = unet_folder(name)
    config, ours = load(folder)
    given = inputs_of(config, theirs.config.sample_size)
    expected, got = run_theirs(theirs, given), np.asarray(run_ours(ours, given))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_config_goes_to_diffusers_and_back(name, unet_folder):
    from diffusers import UNet2DConditionModel

    theirs, folder = unet_folder(name)
    config, _ = load(folder)
    written = diffusers_config(config, 16)
    assert unet_config(json.loads(json.dumps(written))) == config
    rebuilt = UNet2DConditionModel.from_config(written)
    shapes = {key: tuple(each.shape) for key, each in rebuilt.state_dict().items()}
    assert shapes == {key: tuple(each.shape) for key, each in theirs.state_dict().items()}


def test_pooling_matches_diffusers(unet_folder):
    theirs, folder = unet_folder("stage-1")
    config, ours = load(folder)
    text = inputs_of(config, 16)["text"]
    with torch.no_grad():
        expected = theirs.add_embedding(torch.from_numpy(text)).numpy()
    np.testing.assert_allclose(
        np.asarray(ours.conditioning.pool(jnp.asarray(text))), expected, atol=1e-5, rtol=0
    )
