"""A small model of all modalities, and batches in which some rows lack some of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import sharding
from invideo_jax.models import alignment, stage2
from invideo_jax.models.audio_encoder import AudioViT
from invideo_jax.models.text_encoder import Bert
from invideo_jax.steps import contrastive

KEY = jax.random.key(5)
LENGTH, WORDS, FRAMES = 5, 24, 8
# Every loss there is, none with the same factor.
ALL = dict(
    vtc=1.0, vtm=0.9, mlm=0.8, atc=0.7, atm=0.6, amlm=0.5,
    avtc=1.1, avtm=1.2, avmlm=1.3, vsc=0.4, avc=0.3, uta=0.2,
)  # fmt: skip
SLOTS = dict(video="caption", audio="sound", audio_video="caption", speech="speech")
OPTIONS = dict(
    slots=SLOTS,
    mask=dict(name="random", video=0.5, image=0.5),
    words=dict(pad=0, first=1, mask=2, vocabulary=WORDS),
)


def model(dtype=jnp.float32, remat="none", dropout=0.0, **options):
    """Stage 2 with sound; heads, widths and words that two or four devices divide."""
    same = dict(scan=True, remat=remat, dtype=dtype)
    vision = alignment.build(
        "Nano", width=16, depth=2, heads=2, mlp_width=24, patch=4, frames=2, image_size=8,
        pool_heads=2, pool_width=16, mae_layers=0, clip_layers=1, clip_width=8, final_width=8,
        layer_scale=0.5, drop_path=0.3 if dropout else 0.0, **same,
    )  # fmt: skip
    drops = dict(dropout=dropout, attention_dropout=dropout)
    text = Bert(16, 2, 2, 24, fusion_from=1, vocabulary=WORDS, positions=8, **drops, **same)
    audio = AudioViT(16, 1, 2, 24, patch=4, mels=4, frames=FRAMES, **same)
    views = ("video", "audio", "audio_video")
    given = dict(text=text, width=8, audio=audio, fusion_width=16, views=views) | options
    return stage2.Stage2(vision, **given)


@functools.cache
def params(dtype=np.float32, scale=0.3):
    """Random numbers in place of fresh parameters, so that nothing is alike or zero; on the host."""
    abstract = sharding.unbox(jax.eval_shape(lambda: stage2.init(model(), jax.random.key(0))))
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(dtype), abstract)
    return made | {"temperature": np.asarray(0.2, dtype)}


def batch(rows=8, dtype=np.float32, frames=2, seed=1):
    """Rows of which some lack a text, the sound, the picture, or are padding; some show the same."""
    rng, i = np.random.default_rng(seed), np.arange(rows)
    made = dict(
        video=rng.normal(size=(rows, frames, 8, 8, 3)).astype(dtype),
        audio=rng.normal(size=(rows, FRAMES, 4)).astype(dtype),
        audio_frames=np.where(i % 4 == 1, 0, 3 + i % 6).astype(np.int32),
        position=(100 + 3 * i).astype(np.uint32),
        example=np.where(i % 7 == 5, i - 3, i).astype(np.uint32),
        label=np.full(rows, -1, np.int32),
        valid=i % 8 != 6,
        has_video=i % 8 != 3,
    )
    for n, (slot, lost) in enumerate(dict(caption=4, sound=0, speech=2).items()):
        real = np.arange(LENGTH) < (3 + (i + n) % 3)[:, None]
        real &= (i % 8 != lost)[:, None]
        ids = np.where(real, rng.integers(3, WORDS, (rows, LENGTH)), 0).astype(np.int32)
        ids[:, 0] = np.where(real[:, 0], 1, 0)
        made |= {f"text_{slot}": ids, f"text_{slot}_valid": real}
    unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True))
    patches = 4 * frames
    middle = rng.normal(size=(rows, 1, 1 + patches, 8)).astype(dtype)
    final = rng.normal(size=(rows, 8)).astype(dtype)
    return made | dict(clip_middle=unit(middle), clip_final=unit(final))


def objective(weights=None, made=None, **options):
    """The objective of `model()` with all losses on."""
    given = OPTIONS | dict(weights=weights or ALL) | options
    return contrastive.make_objective(made or model(), **given)


def make_loss(weights=None, *, train=False, made=None, **options):
    """As `objective`, with the keys of examples in it."""
    given = OPTIONS | dict(weights=weights or ALL) | options
    return contrastive.make_loss(model=made or model(), stage_key=KEY, train=train, **given)
