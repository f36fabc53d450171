"""Videos, images and sounds in one run: what a stage takes, and evaluations over all of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import sound_files
from small_videos import write_video
from test_modalities import picture

from configs import common, quickstart
from invideo_jax import build, programs, sharding
from invideo_jax.data.pipeline import Loader
from invideo_jax.data.sources import Source, open_source
from invideo_jax.errors import UserError
from invideo_jax.evals import attentive_probe, probe
from invideo_jax.losses import Mean
from invideo_jax.models import video_encoder
from invideo_jax.run import place_stages
from invideo_jax.towers import Towers

VIDEOS, IMAGES, SOUNDS = 5, 3, 2


def recipe(*, sound=True):
    """A contrastive stage of internvideo2's encoder, as small as it gets."""
    config = quickstart.get_config("smoke")
    stage = common.contrastive_stage()
    config.stages = ml_collections.ConfigDict(dict(contrastive=stage))
    config.stage_order = ("contrastive",)
    config.model.name, config.model.size = "internvideo2", "Micro"
    config.model.unlock()
    config.model.update(patch=16, pool_width=32)
    if sound:
        stage.audio.name, stage.text.of.audio, stage.losses.atc = "beats", "audio", 1.0
    common.smoke_contrastive(stage)
    stage.audio.seconds = 1.0
    stage.losses.vtm = stage.losses.mlm = 0.0
    stage.clip.frames, stage.clip.size, stage.batch_size = 4, 32, 8
    stage.shared.width, stage.shared.fusion_width = 16, 32
    stage.length, stage.schedule.warmup = "4 steps", "1 step"
    config.evals = ml_collections.ConfigDict()
    return config


def program(config):
    (stage,) = place_stages(config, 100)
    return programs.program(config, stage)


@pytest.fixture(scope="module")
def made():
    return program(recipe())


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Specs of lists of videos, images and sounds; one of the videos is not there."""
    folder = tmp_path_factory.mktemp("media")
    tone = sound_files.tone(1.0, 440.0, 16000)
    sound_files.write_sound_file(str(folder / "hum.wav"), tone, seconds=0)
    write_video(folder / "clip.mp4")
    picture(folder / "red.jpg")
    found = {}
    for kind, file, count, texts in (
        ("image", "red.jpg", IMAGES, "captions"),
        ("video", "clip.mp4", VIDEOS, "captions"),
        ("audio", "hum.wav", SOUNDS, "audio_captions"),
    ):
        rows = [{"path": file, "id": f"{kind}{i}", texts: f"{kind} {i}"} for i in range(count)]
        rows = [row | {"label": i % 2} for i, row in enumerate(rows)]
        found[kind] = folder / f"{kind}.jsonl"
        found[kind].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def sources(lists):
    """Images first: an evaluation begins with the videos all the same."""
    return [open_source(str(lists[kind])) for kind in ("image", "video", "audio")]


def unit(x):
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1.0)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def ready(made, sources):
    """The evaluators of a mixture, with towers that know colours and loudness; what is told of each batch."""
    towers = Towers(
        video=lambda params, b: {"embedding": unit(b["video"].mean((1, 2, 3)))},
        audio=lambda params, b: {
            "embedding": unit(b["audio"].mean(1)[:, :3]),
            "valid": b["audio_frames"] > 0,
        },
        text=lambda params, ids, valid: {"embedding": unit(ids[:, :3])},
        tokenize=made.towers.tokenize,
    )
    config, beats = recipe(), []
    of = dict(every="0", examples=100)
    evals = dict(loss=dict(of), retrieval=dict(of), retrieval_audio=dict(of))
    config.evals = ml_collections.ConfigDict(evals)
    loss = lambda params, b: {
        f"of_{name}": Mean(b["valid"].sum() * 1.0, (b["valid"] & b[name]).sum() * 1.0)
        for name in ("has_video",)
    }
    program = dataclasses.replace(made, towers=towers, eval_loss=loss)
    options = dict(mesh=sharding.make_mesh(), train=sources, held_out=sources, folder=None)
    options |= dict(on_batch=lambda: beats.append(1), only_due=False)
    return build.evaluators(config, program, **options), beats


def test_what_a_stage_takes(made, sources):
    assert made.media == ("video", "image", "audio")
    build.check_media(made, sources)
    mute = program(recipe(sound=False))
    assert mute.media == ("video", "image")
    with pytest.raises(UserError, match="audio.jsonl holds sounds, and stage contrastive takes"):
        build.check_media(mute, sources)
    config = recipe(sound=False)
    config.model.name = "video_mae"
    config.model.update(tubelet=2)
    del config.model.pool_width
    with pytest.raises(UserError, match="image.jsonl holds images, .* takes only videos. Leave"):
        build.check_media(program(config), sources)


def test_training_refuses_at_once_what_the_stage_cannot_use(sources):
    config = recipe(sound=False)
    options = dict(batch_size=2, start_step=0, steps=1)
    with pytest.raises(UserError, match="audio.jsonl holds sounds"):
        build.train_loader(config, program(config), sources, [1, 1, 1], **options)


def test_an_evaluation_reads_one_kind_after_the_other(made, sources):
    config, mesh = recipe(), sharding.make_mesh()
    options = dict(mesh=mesh, sources=sources, examples=9)
    batches = list(build.eval_batches(config, made, **options))
    shapes = [batch["video"].shape[:2] for batch in batches]
    assert shapes == [(8, 4), (8, 1), (8, 1)]  # all of one number of rows
    rows = {name: np.concatenate([b[name] for b in batches]) for name in ("position", "example")}
    real = np.concatenate([b["valid"] for b in batches])
    assert rows["position"][real].tolist() == list(range(9))
    # Numbers go over all sources as they are listed: images are 0-2, videos 3-7, sounds 8 and 9.
    assert rows["example"][real].tolist() == [3, 4, 5, 6, 7, 0, 1, 2, 8]
    assert [bool(b["has_video"][0]) for b in batches] == [True, True, False]
    twice = list(build.eval_batches(config, made, **options | dict(examples=6, crops=3)))
    found = np.concatenate([b["position"][b["valid"]] for b in twice])
    assert found.tolist() == list(range(18)) and twice[-1]["video"].shape[1] == 1


def test_evaluators_run_over_a_mixture(ready):
    evaluators, _ = ready
    with sharding.use(sharding.make_mesh()):
        found = {name: dict(one.run({}, 0)) for name, one in evaluators.items()}
    assert found["retrieval"]["examples"] == found["retrieval"]["texts"] == VIDEOS + IMAGES
    assert found["retrieval_audio"]["examples"] == SOUNDS
    whole, seen = VIDEOS + IMAGES + SOUNDS, VIDEOS + IMAGES
    assert found["loss"]["of_has_video"] == pytest.approx(whole / seen)


def test_probes_learn_from_pictures_alone(ready):
    given = ready[0]["retrieval"].given
    given = dataclasses.replace(given, encode=lambda params, b: b["video"].mean((1, 2, 3)))
    found = probe.collect(given, {}, examples=100, of="train")
    assert len(found.labels) == VIDEOS + IMAGES and found.features.all()
    batches = list(given.batches(100, taught=False))
    assert [(attentive_probe.known_labels(b) >= 0).sum() for b in batches] == [5, 3, 0]


def test_texts_stand_at_the_positions_and_are_read_once(ready, sources, monkeypatch):
    evaluators, beats = ready
    texts = evaluators["retrieval"].given.texts
    wanted = [(f"video {i}",) for i in range(5)] + [(f"image {i}",) for i in range(3)]
    assert texts(8) == wanted and texts(3) == wanted[:3]
    assert texts(100) == [*wanted, (), ()]

    def never(*_):
        raise AssertionError("read twice")

    monkeypatch.setattr(type(sources[0]), "texts", never)
    monkeypatch.setattr(Source, "texts", never)
    assert texts(100, kind="audio") == [()] * 8 + [("audio 0",), ("audio 1",)]
    assert beats


def test_features_of_images(made):
    encoder = made.encoder
    params = sharding.unbox(
        jax.jit(video_encoder.init, static_argnums=0)(encoder, jax.random.key(0))
    )
    params = {"vision": {"encoder": params}}
    image = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    found = jax.jit(made.encode_tokens)(params, {"video": image})
    assert encoder.frames == 4 and found.shape[:2] == (2, encoder.prefix + 4)
    tokens = jax.jit(encoder.apply)({"params": params["vision"]["encoder"]}, image)[0]
    assert np.allclose(found, tokens, atol=1e-5) and not np.allclose(found[0], found[1])


def test_positives_by_corpus_are_the_loaders_and_need_no_list(lists):
    config = recipe()
    config.stages.contrastive.contrast.positives = "corpus"
    made = program(config)
    sources = [open_source(str(lists["video"]))] * 2
    options = dict(batch_size=10, train=False, modalities=made.modalities)
    with build.loader(config, made.stage, sources, **options) as batches:
        ((batch, _),) = list(batches)
    assert batch["example"].tolist() == [0, 1, 2, 3, 4] * 2


def test_speed_counts_the_share_of_the_videos(made, sources):
    assert build.video_share(made, sources, [1, 2, 1]) == 0.5
    assert build.video_share(made, sources[1:2], [3]) == 1


def test_groups_of_a_run_take_turns_in_training(made, sources):
    config = recipe()
    options = dict(batch_size=2, start_step=0, steps=4)
    with build.train_loader(config, made, sources, [1, 2, 1], **options) as batches:
        found = [batch for batch, _ in batches]
    assert [b["position"].tolist() for b in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    kinds = sorted((b["video"].shape[1], bool(b["has_video"][0])) for b in found)
    assert kinds == [(1, False), (1, True), (4, True), (4, True)]
    one = build.train_loader(config, made, sources[1:2], [1.0], **options)
    assert isinstance(one, Loader) and one.load._in_stage(7) == 7
