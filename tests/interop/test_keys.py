"""Keys, shapes, order and types of InternVideo2's state dicts, without any array in memory."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from invideo_jax import sharding
from invideo_jax.interop import mapping
from invideo_jax.interop.leaves import Leaf
from invideo_jax.models import alignment, video_encoder
from invideo_jax.models.alignment import AlignedEncoder, FinalSpec, HeadsSpec, ProjectedEncoder


def listing(model, layout):
    """Key -> [type, shape] of the state dict that the model's parameters would give."""
    module = alignment if hasattr(model, "encoder") else video_encoder
    encoder = getattr(model, "encoder", model)
    tree = jax.eval_shape(lambda: module.init(model, jax.random.key(0)))
    flat = flatten_dict(sharding.unbox(tree), sep="/")
    unread = {k: Leaf(x.shape, np.dtype(x.dtype), rows=None) for k, x in flat.items()}
    cube = (encoder.tubelet, encoder.patch, encoder.patch)
    state = mapping.to_state(unread, layout=layout, cube=cube)
    back = mapping.to_leaves(state, layout=layout, expected={k: x.shape for k, x in flat.items()})
    assert {k: (x.shape, x.dtype) for k, x in back.items()} == {
        k: (x.shape, np.dtype(x.dtype)) for k, x in flat.items()
    }
    return {key: [str(x.dtype), list(x.shape)] for key, x in state.items()}


def distilled(size):
    return alignment.build(size, scan=True, clip_width=1408, mae_layers=0, mlp=True)


def stage2(size, **options):
    return alignment.build(size, scan=True, frames=4, mae_layers=0, **options)


def clip(size):
    encoder = video_encoder.build(size, scan=True)
    return ProjectedEncoder(encoder) if size in "SBL" else encoder


PUBLISHED = {
    "pretrain_1B": (lambda: alignment.build("1B", scan=True), "internvideo2"),
    "pretrain_6B": (lambda: alignment.build("6B", scan=True), "internvideo2"),
    "distill_small": (lambda: distilled("S"), "internvideo2"),
    "distill_base": (lambda: distilled("B"), "internvideo2"),
    "distill_large": (lambda: distilled("L"), "internvideo2"),
    "stage2_vision_1B": (lambda: stage2("1B", image_positions="separate"), "internvideo2"),
    "stage2_vision_6B": (lambda: stage2("6B"), "internvideo2"),
    "clip_vision_S14": (lambda: clip("S"), "internvideo2_clip_vision"),
    "clip_vision_B14": (lambda: clip("B"), "internvideo2_clip_vision"),
    "clip_vision_L14": (lambda: clip("L"), "internvideo2_clip_vision"),
    "clip_vision_1B": (lambda: clip("1B"), "internvideo2_encoder"),
    "clip_vision_6B": (lambda: clip("6B"), "internvideo2_encoder"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_of_keys(shared, name):
    file = json.loads((shared / f"golden/keys/internvideo2_{name}.json").read_text())
    make, layout = PUBLISHED[name]
    found = listing(make(), layout)
    assert list(found) == list(file["tensors"])
    assert found == file["tensors"]


BLOCK = """
norm1.weight 48 / attn.qkv.weight 144 48 / attn.qkv.bias 144 / attn.proj.weight 48 48
attn.proj.bias 48 / attn.q_norm.weight 48 / attn.k_norm.weight 48 / ls1.gamma 48
norm2.weight 48 / mlp.fc1.weight 96 48 / mlp.fc1.bias 96 / mlp.fc2.weight 48 96 / mlp.fc2.bias 48
ls2.gamma 48
"""
POOL = """
norm1_q.weight 48 / norm1_q.bias 48 / norm1_k.weight 48 / norm1_k.bias 48 / norm1_v.weight 48
norm1_v.bias 48 / cross_attn.q_bias 48 / cross_attn.k_bias 48 / cross_attn.v_bias 48
cross_attn.q.weight 48 48 / cross_attn.k.weight 48 48 / cross_attn.v.weight 48 48
cross_attn.proj.weight 32 48 / cross_attn.proj.bias 32
"""
PATCHES = "proj.weight 48 3 2 8 8 / proj.bias 48"
LINEAR = "head.weight 20 48 / head.bias 20 / norm.weight 20 / norm.bias 20"
MLP = "head.0.weight {n} {n} / head.0.bias {n} / head.2.weight {c} {n} / head.2.bias {c} / norm.weight {c} / norm.bias {c}"


def written(prefix, lines):
    rows = [row.split() for row in lines.replace("\n", "/").split("/") if row.strip()]
    return {prefix + key: ["float32", [int(n) for n in shape]] for key, *shape in rows}


def test_keys_written_out_joint_positions_and_every_option():
    encoder = video_encoder.build(
        "Micro",
        depth=2,
        frames=4,
        tubelet=2,
        image_size=24,
        qkv_bias=True,
        image_positions="separate",
    )
    model = AlignedEncoder(
        encoder, HeadsSpec((0, 1), 20), FinalSpec(12, mlp=True), HeadsSpec((1,), 24, mlp=True)
    )
    want = written("", "cls_token 1 1 48 / pos_embed 1 19 48 / img_pos_embed 1 10 48")
    want |= written("", "clip_pos_embed 1 19 48 / clip_img_pos_embed 1 10 48")
    want |= written("", "mae_pos_embed 1 18 48 / mae_img_pos_embed 1 9 48")
    want |= written("patch_embed.", PATCHES)
    want |= written("blocks.0.", BLOCK) | written("blocks.1.", BLOCK)
    want |= written("clip_projector.", POOL)
    want |= written("clip_decoder.0.", LINEAR) | written("clip_decoder.1.", LINEAR)
    want |= written("final_clip_decoder.", MLP.format(n=32, c=12))
    want |= written("mae_decoder.0.", MLP.format(n=48, c=24))
    found = listing(model, "internvideo2")
    assert found == want and list(found) == list(want)


def test_keys_written_out_separate_positions_and_no_option():
    encoder = video_encoder.build(
        "Micro", depth=1, frames=4, tubelet=2, image_size=24, positions="separate", qk_norm=False,
        layer_scale=0.0,
    )  # fmt: skip
    tables = "pos_embed_spatial 1 9 48 / pos_embed_temporal 1 2 48 / pos_embed_cls 1 1 48"
    block = [row for row in BLOCK.replace("\n", "/").split("/") if row.strip()]
    block = "/".join(x for x in block if not any(k in x for k in ("qkv.bias", "_norm.", "gamma")))
    want = written("", "cls_token 1 1 48 / " + tables)
    want |= written("patch_embed.", PATCHES) | written("blocks.0.", block)
    want |= written("clip_projector.", POOL)
    assert listing(encoder, "internvideo2_encoder") == want
    heads = AlignedEncoder(encoder, clip=HeadsSpec((0,), 20))
    more = written("clip_", tables) | written("clip_decoder.0.", LINEAR)
    assert listing(heads, "internvideo2") == want | more
