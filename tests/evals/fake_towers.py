"""Towers whose embeddings are known: a video is the row `features` of its batch, a text the row it names."""

import jax.numpy as jnp
import numpy as np

from invideo_jax.evals import Given
from invideo_jax.evals.embed import place
from invideo_jax.towers import Towers


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Texts:
    """Embeddings by text; `tokenize` gives the number of each text."""

    def __init__(self, vectors):
        self.names, self.table = list(vectors), np.stack([unit(v) for v in vectors.values()])
        self.asked = []

    def tokenize(self, texts):
        self.asked += texts
        ids = np.zeros((len(texts), 4), np.int32)
        ids[:, 0] = [self.names.index(text) if text else 0 for text in texts]
        return ids, np.arange(4)[None] < np.array([1 if text else 0 for text in texts])[:, None]


def towers_of(texts: Texts, *, match=None, audio=None) -> Towers:
    """`match`: (text vectors [B, P], video vectors [B, P]) -> logits; `audio`: name of the batch's sound."""
    table = jnp.asarray(texts.table, jnp.float32)

    def row(batch, name):
        x = batch[name].astype(jnp.float32)
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.maximum(length, 1e-12)

    def video(params, batch):
        made = row(batch, "features") * params
        return {"embedding": made, "tokens": made[:, None]}

    def text(params, ids, valid):
        made = table[ids[:, 0]]
        return {"embedding": made, "tokens": made[:, None]}

    def sound(params, batch):
        return {"embedding": row(batch, audio), "valid": batch["audio_frames"] > 0}

    def judge(params, words, valid, tokens):
        return match(words[:, 0], tokens[:, 0])

    return Towers(
        video,
        text,
        texts.tokenize,
        audio=sound if audio else None,
        match=judge if match else None,
        vocabulary=len(texts.names),
    )


def given_of(features, captions=None, *, labels=None, valid=None, rows=8, towers=None, **more):
    """What a run gives: batches of `rows` clips, filled up with rows that are not valid.

    Args:
        features: [n, ...] of the clips.
        captions: kind -> captions of each clip.
        more: fields of `Given`, and arrays [n, ...] of the batches by name.
    """
    count = len(features)
    arrays = {name: more.pop(name) for name in list(more) if isinstance(more[name], np.ndarray)}
    arrays |= dict(features=features, position=np.arange(count, dtype=np.uint32))
    arrays["label"] = np.full(count, -1, np.int32) if labels is None else np.int32(labels)
    arrays["valid"] = np.ones(count, bool) if valid is None else valid

    def batches(examples, *, of="held_out", taught=True, clips=1, crops=1):
        end = min(examples, count)
        for start in range(0, end, rows):
            host = {}
            for name, x in arrays.items():
                part = np.zeros((rows, *x.shape[1:]), x.dtype)
                some = x[start : min(start + rows, end)]
                part[: len(some)] = some
                host[name] = part
            yield place({name: lambda mine, x=x: x[mine] for name, x in host.items()}, rows)

    def texts(examples, *, of="held_out", kind="video"):
        return captions.get(kind, [()] * count)[:examples]

    return Given(
        batches,
        lambda *_: {},
        lambda params, batch: batch["features"],
        towers=towers,
        texts=None if captions is None else texts,
        **more,
    )
