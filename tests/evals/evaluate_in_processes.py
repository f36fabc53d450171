"""One of the processes of a run: evaluates known towers on a mesh of 8 devices, and prints what it found."""

import json
import sys

import jax

process, processes, port = map(int, sys.argv[1:])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import test_attentive_probe as attentive  # noqa: E402
import test_multiple_choice as choice  # noqa: E402
import test_retrieval as retrieval  # noqa: E402
import test_zero_shot as zero  # noqa: E402
from fake_towers import Texts, given_of, towers_of  # noqa: E402

from invideo_jax import sharding  # noqa: E402
from invideo_jax.evals import EVALUATORS  # noqa: E402


def judge(words, videos):
    return jnp.sum(words * videos[:, ::-1], axis=1)


def given(features, listed, vectors, **more):
    towers = towers_of(Texts(vectors), match=judge)
    return given_of(features, {"video": listed}, towers=towers, **more)


def evaluators():
    yield "retrieval", given(*retrieval.case(count=37)), dict(examples=37, rerank=6, text_batch=12)
    features, labels, vectors = zero.case(("{}",))
    one = given(features, [], vectors, labels=labels, classes=zero.CLASSES)
    yield "zero_shot", one, dict(examples=29, templates="none")
    features, listed, right, vectors = choice.case()
    one = given(features, listed, vectors, labels=right)
    yield "multiple_choice", one, dict(examples=19, match=True)
    one = attentive.given_both(attentive.tokens_of(64, 1), attentive.tokens_of(20, 2))
    options = dict(examples=20, train_examples=64, epochs=3)
    yield "attentive_probe", one, attentive.OPTIONS | options


with sharding.use(sharding.make_mesh(data=4, fsdp=2)):
    found = {
        name: dict(EVALUATORS.get(name)(one, **options).run(np.float32(1), 0))
        for name, one, options in evaluators()
    }
print("found", json.dumps(found, sort_keys=True))
