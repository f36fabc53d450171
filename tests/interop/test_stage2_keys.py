"""Names of stage 2 and CLIP: full sizes key by key without memory, ways back, fixed and tied arrays."""

import json
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop import mapping, models
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import alignment, stage2, video_clip, video_encoder
from invideo_jax.models.text_encoder import Bert, ClipText

LARGE = dict(width=1024, depth=24, heads=16, mlp_width=4096, fusion_from=19)
MOBILECLIP = dict(width=512, depth=12, heads=8, mlp_width=2048, output_width=512, activation="gelu")


def abstract(model):
    return models.abstract(model)


def listed(model, layout, params=None):
    """Key -> shape in order; the arrays are views of one zero."""
    flat = flatten_dict(params or abstract(model), sep="/")
    views = {k: np.broadcast_to(np.zeros((), np.float32), v.shape) for k, v in flat.items()}
    encoder = model.vision.encoder
    cube = (encoder.tubelet, encoder.patch, encoder.patch)
    state = mapping.to_state(views, layout=layout, cube=cube)
    return {k: [str(v.dtype), list(v.shape)] for k, v in state.items()}


def model_1b(**text):
    vision = alignment.build(
        "1B", frames=4, image_positions="separate", mae_layers=0, scan=True, clip_interval=1
    )
    return stage2.Stage2(vision, Bert(**(LARGE | dict(scan=True) | text)))


def test_the_1b_model_has_the_published_keys_shapes_and_count(request):
    model = model_1b()
    found = listed(model, "internvideo2_stage2")
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract(model)))
    assert params == 1_410_146_493 and len(found) == 1023
    bert = "text_encoder.bert"
    for key, shape in {
        "temp": [],
        "vision_encoder.img_pos_embed": [1, 257, 1408],
        "vision_encoder.clip_decoder.5.head.weight": [3200, 1408],
        f"{bert}.encoder.layer.18.output.dense.weight": [1024, 4096],
        f"{bert}.encoder.layer.23.crossattention.self.value.weight": [1024, 1408],
        "text_encoder.cls.predictions.decoder.weight": [30522, 1024],
        "vision_proj.weight": [512, 768],
        "itm_head.bias": [2],
    }.items():
        assert found[key] == ["float32", shape]
    assert found[f"{bert}.embeddings.position_ids"] == ["int64", [1, 512]]
    assert not any("layer.18.crossattention" in k or ".mae_" in k for k in found)
    folder = request.getfixturevalue("shared") / "golden" / "keys"
    file = json.loads((folder / "internvideo2_stage2_model_1B_bertlarge.json").read_text())
    assert list(found.items()) == list(file["tensors"].items())


def test_mobileclip_b_has_the_published_keys_and_shapes(request):
    vision = alignment.ProjectedEncoder(video_encoder.build("Micro"), 512)
    found = listed(video_clip.VideoClip(vision, ClipText(**MOBILECLIP)), "internvideo2_clip")
    text = {k[13:]: v for k, v in found.items() if k.startswith("text_encoder.")}
    assert len(text) == 149 and sum(math.prod(s) for _, s in text.values()) == 63_428_096
    assert found["vision_align.1.weight"] == ["float32", [512, 32]] and found["temp"][1] == []
    folder = request.getfixturevalue("shared") / "golden" / "keys"
    file = json.loads((folder / "mobileclip_b_text.json").read_text())["tensors"]
    assert list(text.items()) == list(file.items())


def small(**text):
    sizes = dict(
        width=16, depth=3, heads=2, mlp_width=24, fusion_from=2, vocabulary=20, positions=8
    )
    vision = alignment.build(
        "Micro", frames=2, image_size=16, mae_layers=0, clip_layers=2, clip_width=12, final_width=10
    )
    return stage2.Stage2(vision, Bert(**(sizes | text)), width=6)


def clip():
    vision = alignment.ProjectedEncoder(video_encoder.build("Micro", frames=2, image_size=16), 6)
    return video_clip.VideoClip(vision, ClipText(16, 2, 2, 32, 6, vocabulary=20, positions=8))


def random_params(model, dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(dtype)
    return jax.tree.map(draw, abstract(model))


@pytest.mark.parametrize(
    "make, layout",
    [
        (small, "internvideo2_stage2"),
        (lambda: small(fusion_from=0), "internvideo2_stage2"),
        (clip, "internvideo2_clip"),
    ],
)
def test_there_and_back_is_bit_identical_in_any_dtype(make, layout):
    model = make()
    for dtype in (np.float32, np.float16):
        params = random_params(model, dtype)
        state = to_state_dict(params, layout=layout, cube=(1, 8, 8))
        floats = [v for v in state.values() if v.dtype.kind == "f"]
        assert {v.dtype for v in floats} == {np.dtype(dtype)}
        back = to_params(state, layout=layout, expected=abstract(model))
        jax.tree.map(np.testing.assert_array_equal, back, params)
        again = to_state_dict(back, layout=layout, cube=(1, 8, 8))
        assert list(again) == list(state)
        assert all(again[k].tobytes() == state[k].tobytes() for k in state)


def test_fusion_blocks_are_numbered_on_and_lie_where_they_say():
    params = random_params(small())
    state = to_state_dict(params, layout="internvideo2_stage2", cube=(1, 8, 8))
    layer = "text_encoder.bert.encoder.layer"
    text, fusion = (params["text"][f"{n}_stack"]["blocks"] for n in ("text", "fusion"))
    for key, want in {
        f"{layer}.1.attention.self.key.weight": text["attention"]["key"]["kernel"][1].T,
        f"{layer}.2.attention.output.LayerNorm.bias": fusion["norm1"]["bias"][0],
        f"{layer}.2.crossattention.self.value.weight": fusion["cross"]["value"]["kernel"][0].T,
        f"{layer}.2.crossattention.output.LayerNorm.weight": fusion["cross_norm"]["scale"][0],
        f"{layer}.2.output.LayerNorm.weight": fusion["norm2"]["scale"][0],
        "text_encoder.cls.predictions.decoder.bias": params["text"]["head_bias"],
        "text_encoder.cls.predictions.decoder.weight": params["text"]["word_embedding"],
        "text_proj.weight": params["text_projection"]["kernel"].T,
    }.items():
        np.testing.assert_array_equal(state[key], want, err_msg=key)
    assert f"{layer}.1.crossattention.self.key.weight" not in state
    np.testing.assert_array_equal(
        state["text_encoder.bert.embeddings.position_ids"], np.arange(8)[None]
    )


def test_tied_and_fixed_arrays_may_be_absent_but_not_different():
    model = small()
    params = random_params(model)
    state = to_state_dict(params, layout="internvideo2_stage2", cube=(1, 8, 8))
    read = lambda s: to_params(s, layout="internvideo2_stage2", expected=abstract(model))
    head = "text_encoder.cls.predictions.decoder"
    fixed = "text_encoder.bert.embeddings.position_ids"
    less = {k: v for k, v in state.items() if k not in (f"{head}.weight", f"{head}.bias", fixed)}
    jax.tree.map(np.testing.assert_array_equal, read(less), params)
    with pytest.raises(UserError, match=f"{head}.weight must hold the same numbers"):
        read(state | {f"{head}.weight": state[f"{head}.weight"] + 1})
    with pytest.raises(UserError, match="position_ids must be the fixed array"):
        read(state | {fixed: state[fixed] + 1})
    with pytest.raises(UserError, match="Missing: itm_head.bias"):
        read({k: v for k, v in state.items() if k != "itm_head.bias"})


def test_published_bert_is_read_into_a_model_without_fusion():
    model = Bert(16, 3, 2, 24, fusion_from=3, vocabulary=20, positions=8)
    ids = np.ones((1, 2), np.int32)
    init = lambda: model.init(jax.random.key(0), ids, method=lambda m, i: m.words(m.encode(i)))
    expected = sharding.unbox(jax.eval_shape(init))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), expected)
    state = to_state_dict(params, layout="bert", cube=(1, 1, 1))
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }
    assert set(old) != set(state)
    jax.tree.map(
        np.testing.assert_array_equal, to_params(old, layout="bert", expected=expected), params
    )
