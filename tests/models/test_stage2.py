"""The stage-2 model and CLIP as a whole: parts fit together, examples stay apart, files of numbers run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from invideo_jax import losses, sharding
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import alignment, stage2, video_clip, video_encoder
from invideo_jax.models.text_encoder import Bert, ClipText
from tests import golden

B, L = 3, 6
TEXT = dict(width=16, depth=3, heads=2, mlp_width=24, fusion_from=2, vocabulary=30, positions=8)
VISION = dict(width=32, depth=2, heads=2, mlp_width=48, patch=4, frames=2, image_size=8)


def small(**options):
    vision = alignment.build(
        "Micro",
        **(VISION | dict(pool_heads=4, pool_width=20, activation="gelu") | options),
        mae_layers=0,
        clip_layers=2,
        clip_width=12,
        final_width=10,
        scan=True,
    )
    return stage2.Stage2(vision, Bert(**TEXT, scan=True), width=6)


def random_params(model, scale=0.4):
    abstract = sharding.unbox(jax.eval_shape(lambda: stage2.init(model, jax.random.key(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), abstract)
    return params | {"temperature": np.float32(0.2)}


def example():
    rng = np.random.default_rng(1)
    video = rng.normal(size=(B, 2, 8, 8, 3)).astype(np.float32)
    valid = np.arange(L) < np.array([[6], [4], [5]])
    ids = np.where(valid, rng.integers(5, 30, (B, L)), 0).astype(np.int64)
    ids[:, 0] = 1
    mask = np.ones((B, 9), bool)
    mask[:, 0] = False
    for row in mask:
        row[1 + rng.permutation(8)[:3]] = False
    return video, ids, valid, mask


@pytest.fixture(scope="module")
def ready():
    model = small()
    return model, random_params(model)


def test_pairs_with_negatives_are_the_pairs_one_by_one(ready):
    model, params = ready
    video, ids, valid, _ = example()
    apply = lambda *a, method: model.apply({"params": params}, *a, method=method)

    @jax.jit
    def run(video_negative, text_negative):
        seen, text = apply(video, method="encode_video"), apply(ids, valid, method="encode_text")
        pairs = text["tokens"], valid, seen["tokens"]
        found = apply(
            *pairs[:1], jnp.asarray(valid), pairs[2], video_negative, text_negative,
            method="match_negatives",
        )  # fmt: skip
        return found, pairs[0], pairs[2]

    other_video, other_text = np.array([1, 2, 0]), np.array([2, 0, 1])
    found, text, seen = run(other_video, other_text)
    rows = [(i, i) for i in range(B)] + [(t, v) for t, v in enumerate(other_video)]
    rows += [(t, v) for v, t in enumerate(other_text)]
    match = jax.jit(lambda t, v, s: apply(t, v, s, method="match"))
    for row, (t, v) in enumerate(rows):
        alone = match(text[t : t + 1], jnp.asarray(valid[t : t + 1]), seen[v : v + 1])
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
    assert np.abs(found[:B] - found[B : 2 * B]).max() > 1e-3


def test_the_whole_is_its_parts_and_hidden_patches_do_nothing(ready):
    model, params = ready
    video, ids, valid, _ = example()
    visible = np.array([[0, 3, 6], [1, 2, 7], [4, 5, 6]], np.int32)

    @jax.jit
    def run(video):
        out = model.apply({"params": params}, video, visible, ids, valid)
        words = model.apply({"params": params}, ids, valid, out["tokens"], method="words")
        match = model.apply(
            {"params": params}, out["text_tokens"], valid, out["tokens"], method="match"
        )
        return out, words, match

    out, words, match = run(video)
    np.testing.assert_allclose(out["words"], words, atol=1e-5)
    np.testing.assert_allclose(out["match"], match, atol=1e-5)
    projection = params["vision_projection"]
    np.testing.assert_allclose(
        out["embedding"], out["pooled"] @ projection["kernel"] + projection["bias"], atol=1e-5
    )
    gradient = np.asarray(jax.jit(jax.grad(lambda v: run(v)[2].sum()))(jnp.asarray(video)))
    cubes = gradient.reshape(B, 2, 2, 4, 2, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, 8, -1)
    for row, seen in zip(np.abs(cubes).max(-1), visible):
        assert (row[seen] > 0).all() and (np.delete(row, seen) == 0).all()


def test_temperature_is_held_within_its_range_and_can_come_back(ready):
    model, params = ready
    for value, want in [(0.2, 0.2), (0.7, 0.5), (1e-5, 0.001)]:
        now = lambda t: model.apply({"params": params | {"temperature": t}}, method="temperature")
        held, gradient = jax.value_and_grad(now)(jnp.float32(value))
        np.testing.assert_allclose(held, want, rtol=1e-6)
        assert gradient == 1


@pytest.mark.slow  # 10 s of compiling
def test_clip_learns_which_text_belongs_to_which_video():
    vision = alignment.ProjectedEncoder(
        video_encoder.VideoEncoder(**VISION, pool_heads=4, pool_width=20, scan=True), 6
    )
    model = video_clip.VideoClip(vision, ClipText(16, 2, 2, 32, 6, 30, 8, scan=True))
    params = jax.jit(lambda: sharding.unbox(video_clip.init(model, jax.random.key(0))))()
    np.testing.assert_allclose(params["temperature"], 0.01)
    video, ids, *_ = example()
    ids = jnp.asarray(ids, jnp.int32).at[:, -1].set(29)

    def loss(p):
        out = model.apply({"params": p}, video, None, ids)
        scale = model.apply({"params": p}, method="temperature")
        scores = losses.similarity(out["embedding"], out["text_embedding"], scale)
        return losses.contrastive(scores).value

    @jax.jit
    def descend(p):
        def step(p, _):
            value, grads = jax.value_and_grad(loss)(p)
            return jax.tree.map(lambda x, g: x - 0.02 * jnp.sign(g), p, grads), value

        return jax.lax.scan(step, p, None, length=60)

    params, values = descend(params)
    assert float(values[-1]) < float(values[0]) / 10


# ------------------------------------------------------------------- files of numbers: tests.golden


def write(folder, model, params, config, names=None):
    """A file like those of the originals; returns what `tests.golden` says of it."""
    video, ids, valid, mask = example()
    visible = np.stack([np.flatnonzero(~row[1:]) for row in mask]).astype(np.int32)
    pairs, other_video, other_text = np.array([4, 9, 4]), np.array([1, 0, 1]), np.array([1, 2, 1])
    draws = {
        "drawn_masked(p=.5)": np.ones((B, L), np.float32),
        "drawn_replace(p=.8)": np.eye(B, L, 1, np.float32),
        "drawn_random(p=.5)": np.eye(B, L, 2, np.float32),
        "drawn_words": np.full((B, L), 7, np.int64),
    }
    labels = np.where((ids != 0) & (ids != 1), ids, -100)
    shown = np.where(draws["drawn_replace(p=.8)"] > 0, 3, ids)
    shown = np.where(draws["drawn_random(p=.5)"] > 0, 7, shown)
    shown = np.where(labels >= 0, shown, ids)

    def run(params):
        apply = lambda *a, method: model.apply({"params": params}, *a, method=method)
        seen, text = (
            apply(video, visible, method="encode_video"),
            apply(ids, valid, method="encode_text"),
        )
        scores = losses.similarity(seen["embedding"], text["embedding"], params["temperature"])
        real = jnp.asarray(valid)
        match = apply(
            text["tokens"], real, seen["tokens"], other_video, other_text, method="match_negatives"
        )
        words = apply(shown, real, seen["tokens"], method="words")
        picked = jnp.take_along_axis(jax.nn.log_softmax(words), np.maximum(labels, 0)[..., None], 2)
        parts = dict(
            vtc=losses.contrastive(scores, jnp.asarray(pairs)).value,
            vtm=losses.matching(match, jnp.ones(3 * B)).value,
            mlm=-(picked[..., 0] * (labels >= 0)).sum() / (labels >= 0).sum(),
        )
        out = dict(vision_embeds=seen["tokens"], pooled_text_embeds=text["pooled"])
        out |= dict(some_name=match, mlm_logits=words, vision_proj=seen["embedding"])
        out["x_clip_align"] = seen["clip_middle"].swapaxes(0, 1)
        return sum(parts.values()), (out, parts)

    (total, (out, parts)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    back = lambda tree: to_state_dict(
        jax.device_get(tree), layout="internvideo2_stage2", cube=(1, 4, 4)
    )
    tensors = {f"state/{k}": v for k, v in back(params).items()}
    own = ("position_ids", "decoder.weight", "decoder.bias")
    tensors |= {f"grad/{k}": v for k, v in back(grads).items() if not k.endswith(own)}
    tensors |= {f"out/{k}": np.asarray(v) for k, v in out.items()}
    tensors |= {f"loss/{k}": np.asarray(v) for k, v in parts.items()}
    tensors |= {f"mlm/{k}": v for k, v in draws.items()}
    tensors |= {
        "loss/total": np.asarray(total),
        "vtm/vision_neg_indices": other_video,
        "vtm/txt_neg_indices": other_text,
        "mlm/labels": labels,
        "in/video": video.transpose(0, 4, 1, 2, 3),
        "in/input_ids": ids,
        "in/attention_mask": valid.astype(np.int64),
        "in/video_mask": mask,
        "in/idx": pairs,
    }
    tensors |= names or {}
    tensors = {k: np.array(v, order="C") for k, v in tensors.items()}
    save_file(tensors, folder / "c_stage2_model.safetensors")
    meta = {"config": config, "mlm": dict(pad=0, cls=1, mask=3)}
    (folder / "c_stage2_model.json").write_text(json.dumps(meta))
    return golden.main([str(folder / "c_stage2_model.json")])


CONFIG = {
    "model": {
        "vision_encoder": {
            "name": "pretrain_internvideo2_1b_patch14_224",
            "num_heads": 2,
            "attn_pool_num_heads": 4,
            "num_frames": 2,
            "clip_norm_type": "l2",
            "d_model": 32,
            "only_mask": True,
        },
        "text_encoder": {"name": "bert_large", "fusion_layer": 2, "d_model": 16},
        "multimodal": {"enable": True},
        "embed_dim": 6,
        "temp": 0.07,
    },
    "bert_config": {"num_attention_heads": 2, "hidden_size": 16, "layer_norm_eps": 1e-12},
    "criterion": {"loss_weight": {"vtc": 1.0, "vtm": 1.0, "mlm": 1.0, "mvm": 0.0, "uta": 0.0}},
}


@pytest.mark.slow  # 40 s: gradients of each loss on its own
def test_a_file_of_the_whole_model_runs_and_wrong_numbers_fail(ready, tmp_path, capsys):
    model, params = ready
    assert write(tmp_path, model, params, CONFIG) == 0
    said = capsys.readouterr().out
    assert "out/some_name is compared with video_mask/itm_logits" in said and "FAIL" not in said
    assert "gradient of loss_vtc+loss_vtm+loss_mlm of video" in said
    wrong = {"out/pooled_text_embeds": np.ones((B, 16), np.float32)}
    wrong |= {"loss/vtm": np.float32(0.1), "loss/odd": np.zeros((2, 5), np.float32)}
    assert write(tmp_path, model, params, CONFIG, wrong) == 1
    said = capsys.readouterr().out
    assert "FAIL out/" in said and "FAIL loss/" in said and "could not check loss/odd" in said


def test_arguments_are_taken_wherever_they_stand_and_unknown_ones_are_errors(
    ready, tmp_path, capsys
):
    from tests.golden_stage2_model import model_of

    model, params = ready
    state = to_state_dict(params, layout="internvideo2_stage2", cube=(1, 4, 4))
    flat = {"num_heads": 2, "attn_pool_num_heads": 4, "num_attention_heads": 2, "embed_dim": 6}
    for config in (CONFIG, flat, {"vision": {**flat, "depth": 2, "embed_dim": 32}, "bert": {}}):
        if "vision" in config:
            config = config | {"num_attention_heads": 2}
        found, weights = model_of(config, state, 2, 8)
        assert found.text == Bert(**TEXT)
        assert found.vision.clone(parent=None) == small().vision.clone(
            encoder=small().vision.encoder.clone(scan=False, layer_scale=1.0)
        )
    changed = {"model": {"vision_encoder": {"num_heads": 2, "new_thing": 1}}}
    with pytest.raises(ValueError, match="model.vision_encoder.new_thing=1 is not known"):
        model_of(changed, state, 2, 8)
    assert model_of({"mlm": 0.5, **flat}, state, 2, 8)[1] == {"mlm": 0.5}


@pytest.mark.slow
def test_stored_numbers_of_the_original_models_hold(shared, capsys):
    names = ("c_stage2_vision_tiny_samepos", "c_stage2_losses", "d_mobileclip_text_tiny")
    files = [str(shared / "golden" / f"{name}.json") for name in names]
    assert golden.main(files) == 0
    assert "3 of 3 files hold" in capsys.readouterr().out
