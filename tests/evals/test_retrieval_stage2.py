"""Retrieval by a small model of all modalities equals scoring every pair alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_towers import given_of

from invideo_jax import sharding
from invideo_jax.evals import EVALUATORS
from invideo_jax.models import alignment, stage2
from invideo_jax.models.audio_encoder import AudioViT
from invideo_jax.models.text_encoder import Bert
from invideo_jax.steps import contrastive

WORDS, LENGTH, FRAMES = 24, 6, 8


def tokenize(texts):
    """Each letter is a word."""
    ids = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in zip(ids, texts):
        found = [1] + [3 + ord(letter) % 20 for letter in text[: LENGTH - 1]]
        row[: len(found)] = found
    return ids, ids > 0


@pytest.fixture(scope="module")
def small():
    """The model's towers, random parameters, and a batch of 9 clips of which two have no sound."""
    vision = alignment.build(
        "Nano", width=16, depth=1, heads=2, mlp_width=24, patch=4, frames=2, image_size=8,
        pool_heads=2, pool_width=16, mae_layers=0, clip_layers=0,
    )  # fmt: skip
    text = Bert(16, 2, 2, 24, fusion_from=1, vocabulary=WORDS, positions=8, types=2)
    audio = AudioViT(16, 1, 2, 24, patch=4, mels=4, frames=FRAMES)
    model = stage2.Stage2(vision, text, width=8, audio=audio, fusion_width=16, views=("video",))
    shapes = sharding.unbox(jax.eval_shape(lambda: stage2.init(model, jax.random.key(0))))
    rng = np.random.default_rng(0)
    draw = lambda x: np.float32(0.4 * rng.normal(size=x.shape))
    params = jax.tree.map(draw, shapes) | {"temperature": np.float32(0.2)}
    entries = dict(
        video=rng.integers(0, 256, (9, 2, 8, 8, 3)).astype(np.uint8),
        audio=np.float32(rng.normal(size=(9, FRAMES, 4))),
        audio_frames=np.array([8, 8, 0, 5, 8, 8, 0, 8, 6], np.int32),
    )
    return contrastive.make_towers(model, tokenize), params, entries


CAPTIONS = [
    tuple(f"{chr(97 + i)}{chr(104 + 2 * i + j)}x"[: 2 + j] for j in range(1 + i % 2))
    for i in range(9)
]


def ranks_of(scores, query_owner, owner):
    return [
        1 + int((row[owner != own] > row[owner == own].max()).sum())
        for row, own in zip(scores, query_owner)
    ]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "gallery",
    ["video", pytest.param("audio", marks=SLOW), pytest.param("audio_video", marks=SLOW)],
)
def test_evaluator_equals_every_pair_alone(small, gallery):
    towers, params, entries = small
    heard = np.flatnonzero(entries["audio_frames"] > 0) if gallery != "video" else np.arange(9)
    texts = [(t, i) for i in heard for t in CAPTIONS[i]]
    owner = np.array([i for _, i in texts])
    one = lambda i: {k: jnp.asarray(x[i : i + 1]) for k, x in entries.items()}
    embed = jax.jit(getattr(towers, gallery))
    read = jax.jit(towers.text)
    videos = [embed(params, one(i)) for i in heard]
    words = [read(params, *tokenize([t])) for t, _ in texts]
    row = lambda made: np.concatenate([np.asarray(x["embedding"]) for x in made])
    scores = row(words) @ row(videos).T
    kind = {gallery: CAPTIONS}
    given = given_of(np.zeros((9, 1)), kind, towers=towers, rows=4, **entries)
    options = dict(examples=9, text=gallery, gallery=gallery, text_batch=4)
    ranks = {"": scores}
    if gallery == "video":
        options |= dict(rerank=20)  # all
        judge = jax.jit(towers.match)
        ranks["_rerank"] = np.array([
            [judge(params, w["tokens"], tokenize([t])[1], v["tokens"])[0] for v in videos]
            for w, (t, _) in zip(words, texts)
        ])  # fmt: skip
    found = dict(EVALUATORS.get("retrieval")(given, **options).run(params, 0))
    for end, table in ranks.items():
        forth, back = ranks_of(table, owner, heard), ranks_of(table.T, heard, owner)
        for name, want in ((f"text_{gallery}", forth), (f"{gallery}_text", back)):
            assert len(set(want)) > 1
            assert found[f"{name}_mean_rank{end}"] == pytest.approx(np.mean(want)), (name, end)
            assert found[f"{name}_r1{end}"] == pytest.approx(np.mean(np.array(want) == 1))
    assert found["examples"] == len(heard) and found["texts"] == len(texts)


@pytest.mark.slow
def test_a_sharded_model_finds_the_same(small):
    towers, params, entries = small
    given = given_of(np.zeros((9, 1)), {"video": CAPTIONS}, towers=towers, **entries)
    made = EVALUATORS.get("retrieval")(given, examples=9, rerank=4, text_batch=8)
    want = dict(made.run(params, 0))
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        assert dict(made.run(params, 0)) == pytest.approx(want)
