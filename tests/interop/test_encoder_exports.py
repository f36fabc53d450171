"""The encoder of any model of ours goes to PyTorch and to StableHLO: of latent, fused, aligned ones and classifiers."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from invideo_jax.checkpoint import Checkpoints
from invideo_jax.errors import UserError
from invideo_jax.interop import models, safetensors_io, stablehlo, to_torch
from invideo_jax.models import (
    alignment,
    classifier,
    clip_vit,
    fusion,
    predictor,
    uniformer_v2,
    video_encoder,
    video_mae,
)

TINY = dict(frames=4, image_size=16, depth=2)


def latent():
    encoder = video_encoder.build("Micro", **TINY)
    predicts = predictor.Predictor(encoder.width, encoder.grid, width=32, depth=1, heads=2)
    return predictor.LatentModel(encoder, predicts)


def fused(other=uniformer_v2.build, **options):
    masked = video_mae.build_encoder("Micro", **TINY, last_norm=False)
    multimodal = other("Micro", frames=2, image_size=16, depth=2, **options)
    return fusion.FusedClassifier(masked, multimodal, classes=5, modules=2, heads=4)


def aligned():
    return alignment.build("Micro", **TINY, clip_width=24, clip_layers=1, mae_layers=0)


# layout, model, where its encoder is
CASES = {
    "latent": ("internvideo2_encoder", latent, "encoder"),
    "fused": ("videomae_encoder", lambda: fused(extractors=2), "masked"),
    "fused_clip": ("videomae_encoder", lambda: fused(clip_vit.build), "masked"),
    "aligned": ("internvideo2_encoder", aligned, "encoder"),
    "classifier": (
        "internvideo2_encoder",
        lambda: classifier.build("Micro", classes=7, **TINY),
        "encoder",
    ),
    "video_mae": ("videomae_encoder", lambda: video_mae.build("Micro", **TINY), "encoder"),
}


def random_params(model):
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    return jax.tree.map(draw, models.abstract(model))


def workdir(place, model, params):
    """A run whose newest checkpoint has these parameters."""
    meta = dict(step=1, stage="s", config={}, model=models.text_of(model))
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(jax.numpy.asarray, params)}, meta, wait=True)
    return place


@pytest.mark.parametrize("name", CASES)
def test_every_model_is_text_and_back(name):
    model = CASES[name][1]()
    text = json.loads(json.dumps(models.describe(model)))
    assert models.make(text) == model
    encoder, path = models.encoder_of(model)
    whole, inside = models.shapes(model), models.shapes(encoder)
    assert path == CASES[name][2]
    assert {f"{path}/{k}": x for k, x in inside.items()}.items() <= whole.items()
    changed = models.encoder_of(models.with_encoder(model, dtype=jax.numpy.bfloat16))[0]
    assert changed.dtype == jax.numpy.bfloat16


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("fused_clip", "video_mae")]


@pytest.mark.parametrize("name", ["latent", "fused", "aligned", "classifier", *SLOW])
def test_the_encoder_of_a_run_is_written_for_torch(tmp_path, name):
    """Its own keys alone, and PyTorch gives the numbers of JAX for them."""
    pytest.importorskip("torch")
    layout, make, path = CASES[name]
    model = make()
    params = random_params(model)
    run, out = workdir(tmp_path / "run", model, params), tmp_path / "out"
    assert to_torch.main([f"--workdir={run}", f"--layout={layout}", f"--output={out}"]) == 0
    encoder, _ = models.encoder_of(model)
    cube = models.cube_of(model)
    want = to_torch.to_state_dict(params[path], layout=layout, cube=cube)
    found = safetensors_io.read(out / "model.safetensors")
    assert set(found) == set(want)
    assert all(np.array_equal(found[key].read(), x) for key, x in want.items())
    checked = json.loads((out / "certificate.json").read_text())["checked"]
    assert set(checked["differences"]) == {"tokens", "pooled"}
    assert max(checked["shares"].values()) < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == models.describe(encoder)["model"]


@pytest.mark.parametrize("name", ["latent", "fused"])
def test_the_encoder_of_a_run_is_a_program(tmp_path, name):
    _, make, path = CASES[name]
    model = make()
    params = random_params(model)
    run, file = workdir(tmp_path / "run", model, params), tmp_path / "x.stablehlo"
    argv = [f"--checkpoint={run}", f"--output={file}", "--platforms=cpu"]
    assert stablehlo.main(argv) == 0
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    video = np.random.default_rng(1).integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8)
    encoder, _ = models.encoder_of(model)
    want = models.embed(encoder, params[path], video)
    for got, name in zip(program.call(video), ("tokens", "pooled")):
        np.testing.assert_allclose(got, want[name], atol=1e-6, rtol=1e-6)


def test_a_layout_of_something_else_is_refused(tmp_path):
    model = latent()
    flat = flatten_dict(random_params(model), sep="/")
    with pytest.raises(UserError, match="Layout 'videomae_encoder' and the parameters must match"):
        to_torch.export(tmp_path, flat, models.describe(model), layout="videomae_encoder")
    assert unflatten_dict(flat, sep="/").keys() == {"encoder", "predictor"}
