"""The reconstruction evaluator: exact averages over valid rows, PSNR, and the clips it keeps."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from invideo_jax import losses, sharding
from invideo_jax.evals import EVALUATORS, reconstruction
from invideo_jax.losses import Mean
from invideo_jax.models.video_mae import init as init_model
from invideo_jax.models.video_mae import make
from invideo_jax.steps import masked
from invideo_jax.steps.update import named_averages

T, S = 4, 16
MASK = dict(name="tube", ratio=0.75)


def clips_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, T, S, S, 3), np.uint8)


def batches_of(video: np.ndarray, size: int) -> list[dict]:
    """Batches of `size` rows, the last one padded with rows of noise that are not valid."""
    batches = []
    for first in range(0, len(video), size):
        rows = video[first : first + size]
        missing = size - len(rows)
        batches.append(
            {
                "video": np.concatenate([rows, clips_of(missing, seed=99)]),
                "position": np.arange(first, first + size, dtype=np.uint32),
                "valid": np.arange(size) < len(rows),
            }
        )
    return batches


@pytest.fixture(scope="module")
def tiny():
    """A small VideoMAE, its parameters, and its jitted evaluation functions."""
    model = make(
        width=16,
        depth=1,
        heads=2,
        mlp_width=32,
        decoder_width=8,
        decoder_depth=1,
        decoder_heads=2,
        decoder_mlp_width=16,
        patch=4,
        frames=T,
        image_size=S,
    )
    params = jax.jit(lambda: sharding.unbox(init_model(model, jax.random.key(0))))()
    options = dict(model=model, stage_key=jax.random.key(1), mask=MASK)
    eval_loss = jax.jit(named_averages(masked.make_loss(train=False, **options)))
    reconstruct = jax.jit(masked.make_reconstruct(**options))
    return model, params, eval_loss, reconstruct


def evaluator(tiny, batches, **options) -> reconstruction.Evaluator:
    _, _, eval_loss, reconstruct = tiny
    return reconstruction.Evaluator(
        batches=lambda: iter(batches), eval_loss=eval_loss, reconstruct=reconstruct, **options
    )


def naive_psnr(original, masked_input, filled) -> float:
    """Decibels of one clip, pixel by pixel."""
    errors = []
    for at in np.ndindex(original.shape[:-1]):
        if (masked_input[at] != original[at]).any():
            errors.append(np.mean((filled[at].astype(np.float64) - original[at]) ** 2))
    return -10 * np.log10(max(np.mean(errors), 1e-10))


def test_values_agree_with_a_plain_loop(tiny):
    model, params, eval_loss, reconstruct = tiny
    video = clips_of(8)
    found = dict(evaluator(tiny, batches_of(video, 8)).run(params, 0))
    (batch,) = batches_of(video, 8)
    triple = [np.asarray(x) for x in reconstruct(params, batch)]
    expected = np.mean([naive_psnr(*(x[i] for x in triple)) for i in range(8)])
    np.testing.assert_allclose(found["psnr"], expected, rtol=1e-5)

    keys = masked.example_keys(jax.random.key(1), jnp.asarray(batch["position"]))
    visible, hidden = masked.draw_mask(model.encoder.grid, keys, MASK)
    prediction, _ = jax.jit(model.apply)({"params": params}, batch["video"], visible, hidden)
    target = np.asarray(
        masked.target_cubes(model.encoder, jnp.asarray(batch["video"]), hidden), np.float64
    )
    total = 0.0
    for row, cube in np.ndindex(target.shape[:2]):
        pixels = target[row, cube].reshape(-1, 3)
        pixels = (pixels - pixels.mean(0)) / (pixels.std(0, ddof=1) + 1e-6)
        total += np.mean((np.asarray(prediction)[row, cube] - pixels.reshape(-1)) ** 2)
    np.testing.assert_allclose(found["loss"], total / np.prod(target.shape[:2]), rtol=1e-5)


# Two batch sizes by default, the same in all tests: each one compiles the model anew.
SLOW_SIZES = [pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5)]


@pytest.mark.parametrize("size", [3, *SLOW_SIZES])
def test_batch_size_and_padding_change_nothing(tiny, size):
    _, params, _, _ = tiny
    video = clips_of(5)
    whole = dict(evaluator(tiny, batches_of(video, 8)).run(params, 0))
    cut = dict(evaluator(tiny, batches_of(video, size)).run(params, 0))
    assert set(cut) == {"loss", "psnr"}
    for name in whole:
        np.testing.assert_allclose(cut[name], whole[name], rtol=2e-6)


def test_rows_that_are_not_valid_count_for_nothing_even_nan(tiny):
    _, params, _, _ = tiny

    def eval_loss(params, batch):
        row = batch["video"].astype(jnp.float32).mean(axis=(1, 2, 3, 4))
        return {"loss": losses.mean(jnp.where(batch["valid"], row, jnp.nan), batch["valid"])}

    def reconstruct(params, batch):
        original = batch["video"] / 255.0
        bad = jnp.where(batch["valid"][:, None, None, None, None], original + 0.1, jnp.nan)
        return original, jnp.full_like(original, 0.5), bad

    video = clips_of(3)
    judge = reconstruction.Evaluator(
        batches=lambda: batches_of(video, 4), eval_loss=eval_loss, reconstruct=reconstruct
    )
    found = dict(judge.run(params, 0))
    np.testing.assert_allclose(found["loss"], video.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["psnr"], 20.0, rtol=1e-5)  # an error of 0.1 everywhere


def test_evaluation_is_the_same_at_each_step_and_changes_no_parameter(tiny):
    _, params, _, _ = tiny
    before = jax.tree.map(np.array, params)
    judge = evaluator(tiny, batches_of(clips_of(4), 3))
    first, second = dict(judge.run(params, 10)), dict(judge.run(params, 20_000))
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize(
    "shape",
    [
        dict(data=2, fsdp=2, tensor=2),
        pytest.param(dict(data=8), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_see_the_same_masks_and_give_the_same_values(tiny, shape, tmp_path):
    _, params, _, _ = tiny
    batches = batches_of(clips_of(13), 8)
    one = dict(evaluator(tiny, batches, workdir=tmp_path / "one").run(params, 1))
    mesh = sharding.make_mesh(**(dict(data=1, fsdp=1, tensor=1, sequence=1) | shape))
    with sharding.use(mesh):
        spread = jax.sharding.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        batches = [{k: jax.device_put(v, spread) for k, v in b.items()} for b in batches]
        many = dict(evaluator(tiny, batches, workdir=tmp_path / "many").run(params, 1))
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)
    name = "reconstructions/step_00000001.npz"
    with np.load(tmp_path / "one" / name) as a, np.load(tmp_path / "many" / name) as b:
        np.testing.assert_array_equal(a["masked"], b["masked"])
        np.testing.assert_array_equal(a["position"], b["position"])


@pytest.mark.parametrize("size", [3, 8])
def test_the_first_valid_clips_are_kept_as_they_are(tiny, tmp_path, size):
    _, params, _, _ = tiny
    video = clips_of(7)
    batches = batches_of(video, size)
    batches[0]["valid"][0] = False
    dict(evaluator(tiny, batches, workdir=tmp_path, pictures=4).run(params, 123))
    (file,) = (tmp_path / "reconstructions").iterdir()
    assert file.name == "step_00000123.npz"
    with np.load(file) as kept:
        np.testing.assert_array_equal(kept["position"], [1, 2, 3, 4])
        np.testing.assert_array_equal(kept["original"], video[1:5])
        hidden = (kept["masked"] != kept["original"]).any(-1)
        assert (kept["masked"][hidden] == 128).all()
        # 12 of 16 cubes of each frame pair are hidden; a few hidden pixels may be grey by chance
        assert abs(hidden.mean() - 0.75) < 0.01
        shown = (kept["masked"] != 128).any(-1)
        np.testing.assert_array_equal(kept["reconstruction"][shown], kept["original"][shown])


def test_fewer_clips_than_pictures_and_none_without_a_workdir(tiny, tmp_path, monkeypatch):
    _, params, _, _ = tiny
    batches = batches_of(clips_of(2), 3)
    dict(evaluator(tiny, batches, workdir=tmp_path / "a", pictures=6).run(params, 1))
    with np.load(tmp_path / "a" / "reconstructions" / "step_00000001.npz") as kept:
        assert len(kept["original"]) == 2
    dict(evaluator(tiny, batches).run(params, 1))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    dict(evaluator(tiny, batches, workdir=tmp_path / "b").run(params, 1))
    assert not (tmp_path / "b").exists()


def test_a_perfect_copy_has_a_finite_psnr_and_nothing_hidden_has_no_weight():
    original = jnp.asarray(clips_of(2) / 255.0, jnp.float32)
    grey = jnp.full_like(original, 0.5).at[1].set(original[1])
    mean = reconstruction.psnr(original, grey, original, jnp.array([True, True]))
    assert (float(mean.total), float(mean.weight)) == (pytest.approx(100.0), 1.0)
    assert isinstance(mean, Mean)


def test_psnr_looks_at_hidden_pixels_only():
    original = jnp.asarray(clips_of(3) / 255.0, jnp.float32)
    hide = np.zeros((3, T, S, S, 1), bool)
    hide[:, :, :4] = True
    grey = jnp.where(hide, 0.5, original)
    error = np.array([0.1, 0.01, 0.001])[:, None, None, None, None]
    filled = jnp.where(hide, original + error, original + 0.7)
    mean = reconstruction.psnr(original, grey, filled, jnp.array([True, True, False]))
    assert float(mean.total) == pytest.approx(20.0 + 40.0, rel=1e-4)
    assert float(mean.weight) == 2.0


def test_no_batch_is_an_error(tiny):
    _, params, _, _ = tiny
    with pytest.raises(ValueError, match="batches must give at least one batch; got none"):
        dict(evaluator(tiny, []).run(params, 0))


@pytest.mark.parametrize("name", sorted(EVALUATORS))
def test_every_registered_evaluator_keeps_the_contract(name):
    found = EVALUATORS.get(name)
    given, *options = inspect.signature(found).parameters.values()
    assert given.name == "given" and all(x.kind is x.KEYWORD_ONLY for x in options)
    module = getattr(found, "func", found).__module__  # some are others with other defaults
    assert module.startswith("invideo_jax.evals.")
