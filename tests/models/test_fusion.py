"""Cross-model attention: nothing changes at the start, directions, what is frozen, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.models import clip_vit, fusion, pixels, uniformer_v2
from invideo_jax.models.video_mae import VideoMAEEncoder

SLOW = pytest.mark.slow


def tiny(other="uniformer", **options):
    masked = VideoMAEEncoder(
        32, 4, 4, 64, patch=8, frames=4, image_size=16, last_norm=False, scan=True
    )
    sizes = dict(frames=2, image_size=16, depth=3, scan=True, embed=16)
    if other == "uniformer":
        multimodal = uniformer_v2.build("Micro", extractors=2, **sizes)
    else:
        multimodal = clip_vit.build("Micro", **sizes)
    return fusion.FusedClassifier(
        masked, multimodal, classes=5, **(dict(modules=2, heads=4) | options)
    )


@functools.cache
def fresh(model, shaken=False):
    init = lambda: sharding.unbox(fusion.init(model, jax.random.key(0)))
    params = jax.jit(init)()
    if shaken:
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(1)
        params = tree.unflatten([x + 0.1 * rng.normal(size=x.shape).astype("f") for x in leaves])
    return params


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, video):
    return model.apply({"params": params}, video)


def video_of(rows=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 256, (rows, 4, 16, 16, 3), dtype=np.uint8))


def norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def branch(params, pooled):
    x = norm(params["fc_norm"], np.asarray(pooled))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
    "other, reading",
    [
        ("uniformer", "R2"),
        pytest.param("uniformer", "R1", marks=SLOW),
        pytest.param("clip", "R2", marks=SLOW),
    ],
)
def test_at_the_start_both_encoders_run_as_alone(other, reading):
    model, video = tiny(other, reading=reading), video_of()
    # Everything is shaken but what starts at zero in the modules.
    params, start = dict(fresh(model, shaken=True)), fresh(model)
    for name in params:
        if name.startswith("exchanges"):
            params[name] = start[name]
    alone = jax.jit(
        lambda p, v: (lambda x: model.masked.apply({"params": p}, x, method="pooled"))(
            model.masked.apply({"params": p}, v)[0]
        )
    )(params["masked"], video)
    whole = lambda m, v: m.pooled(m(v)[0])
    beside = jax.jit(lambda p, v: model.multimodal.apply({"params": p}, v, method=whole))(
        params["multimodal"], video[:, ::2]
    )
    found, scores = run(model, params, video)
    want = [branch(params["masked_head"], alone), branch(params["multimodal_head"], beside)]
    np.testing.assert_allclose(scores["masked"], want[0], atol=2e-5)
    np.testing.assert_allclose(scores["multimodal"], want[1], atol=2e-5)
    share = params["combination"]
    np.testing.assert_allclose(found, share[0] * want[0] + share[1] * want[1], atol=4e-5)
    np.testing.assert_array_equal(start["combination"], [0.5, 0.5])


@pytest.mark.parametrize(
    "options, changed",
    [
        (dict(modules=1, reading="R2"), {"multimodal"}),
        (dict(modules=1, reading="R1"), {"masked"}),
        pytest.param(
            dict(reading="R2"), {"masked", "multimodal"}, marks=SLOW
        ),  # what goes in comes back through the last
        pytest.param(dict(directions=("to_masked", "to_masked")), {"masked"}, marks=SLOW),
        pytest.param(
            dict(directions=("to_multimodal", "to_multimodal")), {"multimodal"}, marks=SLOW
        ),
    ],
)
@pytest.mark.slow
def test_a_module_changes_the_side_that_asks(options, changed):
    model, video = tiny(**options), video_of(1)
    params = fresh(model, shaken=True)
    plain = {k: fresh(model)[k] if k.startswith("exchanges") else v for k, v in params.items()}
    (_, found), (_, want) = run(model, params, video), run(model, plain, video)
    for side in ("masked", "multimodal"):
        assert (np.abs(np.asarray(found[side] - want[side])).max() > 1e-4) == (side in changed)


def test_places_and_directions():
    model = tiny(modules=3)
    assert model.places == [(0, 0), (1, 1), (3, 2)]
    assert model.ways == ("to_masked", "to_masked", "to_multimodal")
    assert tiny(modules=3, reading="R1").ways == ("to_multimodal", "to_multimodal", "to_masked")
    big = fusion.FusedClassifier(
        VideoMAEEncoder(1024, 24, 16, 4096), uniformer_v2.build("L", frames=8), classes=400
    )
    assert big.places == [(5, 20), (11, 21), (17, 22), (23, 23)] and big.frame_step == 2


def test_frozen_are_the_encoders_but_for_the_query_token():
    for other, query in (("uniformer", "temporal_cls_token"), ("clip", "cls_token")):
        params = jax.eval_shape(functools.partial(fusion.init, tiny(other), jax.random.key(0)))
        paths = [
            sharding.path_of(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(sharding.unbox(params))
        ]
        trained = {p for p in paths if not any(re.search(f, p) for f in fusion.FROZEN)}
        assert f"multimodal/{query}" in trained
        assert {p.split("/")[0] for p in trained - {f"multimodal/{query}"}} == {
            "combination", "exchanges_0", "exchanges_1", "masked_head", "multimodal_head",
        }  # fmt: skip


@pytest.mark.slow
def test_a_normalised_video_is_renormalised_for_the_other_encoder():
    model, video = tiny(), video_of()
    params = fresh(model, shaken=True)
    given = pixels.normalise(video, "imagenet")
    np.testing.assert_allclose(
        run(model, params, given)[0], run(model, params, video)[0], atol=2e-5
    )


def test_what_is_trained_has_gradients_at_the_start():
    model, video = tiny(), video_of()
    params = fresh(model)
    loss = lambda p: jnp.square(model.apply({"params": p}, video)[0] - 1).mean()
    grad = jax.jit(jax.grad(loss))(params)
    for name in ("exchanges_0", "exchanges_1"):
        assert np.abs(grad[name]["attention"]["out"]["kernel"]).max() > 0
    # The last module's query is a class token of zeros, whose MLP has nothing to work on before a first step.
    assert np.abs(grad["exchanges_0"]["down"]["kernel"]).max() > 0
    assert np.abs(grad["multimodal"]["temporal_cls_token"]).max() > 0
    assert np.abs(grad["combination"]).min() > 0


def test_what_does_not_fit_is_refused():
    for options, text in (
        (dict(modules=4), "got modules=4, blocks=4 and 3"),
        (dict(reading="R3"), "got reading='R3'"),
        (dict(directions=("to_masked",)), "for each of 2 modules"),
        (dict(directions=("to_masked", "both")), "to_masked, to_multimodal"),
        (dict(heads=5), "got heads=5, width="),
    ):
        with pytest.raises(UserError, match=text):
            tiny(**options).check()
    model = tiny()
    with pytest.raises(UserError, match="got frames=3 and 2"):
        model.clone(masked=model.masked.clone(frames=3, tubelet=1)).check()
