"""Published files of teachers and towers, at a tiny size: converted, and taken as what a stage needs."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from invideo_jax import sharding, teaching
from invideo_jax.errors import UserError
from invideo_jax.interop import folder, from_torch, models, torch_zip
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import clip_vit, teachers, uniformer_v2, video_encoder, video_mae
from invideo_jax.programs import Frozen, Teacher

INTERNVL = dict(frames=1, image_size=16, depth=2, layer_scale=0.1)
MAE = dict(frames=4, image_size=16, depth=2, last_norm=True)
CLIP = dict(frames=4, image_size=16, depth=2)
_SOME = np.ones((2, 3), np.float32)
TEXT = {
    "transformer.resblocks.0.ln_1.weight": _SOME,
    "text_projection": _SOME,
    "logit_scale": _SOME,
}
DECODER = {
    "decoder.blocks.0.norm1.weight": _SOME,
    "encoder_to_decoder.weight": _SOME,
    "mask_token": _SOME,
}
UNIFORMER = dict(frames=4, image_size=16, depth=5)
# layout -> model, what stands before its keys, what else the file holds, its entry, what must be said
FILES = {
    "internvl_vision": (
        lambda: video_encoder.build("Micro", **INTERNVL),
        "", TEXT, "module", ["--size=Micro"],
    ),
    "videomae_encoder": (
        lambda: video_mae.build_encoder("Micro", **MAE),
        "encoder.", DECODER, "model", ["--size=Micro", "--old_frames=4", "--old_image_size=16"],
    ),
    "clip_visual": (
        lambda: clip_vit.build("Micro", **CLIP),
        "", TEXT | {"positional_embedding": _SOME}, "state_dict", ["--model.heads=4", "--old_frames=4"],
    ),
    "clip_visual_hf": (
        lambda: clip_vit.build("Micro", **CLIP),
        "vision_model.", {"text_model.final_layer_norm.weight": _SOME, "logit_scale": _SOME}, "",
        ["--model.heads=4", "--old_frames=4"],
    ),
    "viclip_visual": (
        lambda: clip_vit.build("Micro", **CLIP, joint=True),
        "", {"text_encoder.ln_final.weight": _SOME, "temp": _SOME}, "model", ["--model.heads=4"],
    ),
    "internvideo1_multimodal": (
        lambda: uniformer_v2.build("Micro", **UNIFORMER),
        "clip.", {f"clip.{key}": x for key, x in TEXT.items()}, "state_dict",
        ["--model.heads=4", "--old_frames=4"],
    ),
}  # fmt: skip


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    return jax.tree.map(draw, models.abstract(model))


def published(tmp_path, layout, state):
    """A file of torch.save with the file's entry, prefix and other keys."""
    torch = pytest.importorskip("torch")
    _, prefix, beside, entry, _ = FILES[layout]
    apart = ("visual_projection",)  # of the whole CLIP, beside its vision model
    named = {k if k.startswith(apart) else prefix + k: x for k, x in state.items()}
    named = {k: torch.from_numpy(np.array(x)) for k, x in (named | beside).items()}
    torch.save({entry: named, "epoch": 3} if entry else named, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def state_of(layout, model, params):
    return to_state_dict(params, layout=layout, cube=models.cube_of(model))


def convert(tmp_path, layout, state, *options):
    file = published(tmp_path, layout, state)
    out = tmp_path / "ours"
    argv = [f"--layout={layout}", f"--input={file}", f"--output={out}"]
    assert from_torch.main([*argv, *FILES[layout][-1], *options]) == 0
    return out


@pytest.mark.parametrize("layout", FILES)
def test_a_published_file_becomes_its_model(tmp_path, layout):
    model = FILES[layout][0]()
    params = random_params(model)
    meta, found = folder.open_params(convert(tmp_path, layout, state_of(layout, model, params)))
    assert models.make(meta) == model
    want = flatten_dict(params, sep="/")
    assert set(found) == set(want)
    assert all(np.array_equal(found[path], x) for path, x in want.items())


def teacher_of(layout):
    if layout == "internvl_vision":
        options = dict(depth=2, frames=4, image_size=16, layers=1)
        return teachers.internvl("Micro", **options)
    return teachers.video_mae_teacher("Micro", **MAE, layers=1)


@pytest.mark.parametrize("layout, name", [("internvl_vision", "clip"), ("videomae_encoder", "mae")])
def test_a_converted_file_teaches(tmp_path, layout, name):
    """The folder is a source of teachers, and its features are those of the file's numbers."""
    model = FILES[layout][0]()
    params = random_params(model)
    place = convert(tmp_path, layout, state_of(layout, model, params))
    teacher = teacher_of(layout)
    frozen = Frozen(str(place), lambda: teacher.init(jax.random.key(0)))
    placed = teaching.place(Teacher({name: frozen}, lambda p, batch: {}), sharding.make_mesh())
    jax.tree.map(np.testing.assert_array_equal, placed[name], params)
    video = np.random.default_rng(1).integers(0, 256, (1, 4, 16, 16, 3)).astype(np.uint8)
    middle = jax.jit(teacher)(placed[name], video)["middle"]
    assert middle.shape[:2] == (1, 1) and np.isfinite(middle).all()


def test_a_convolution_of_images_is_one_of_one_frame(tmp_path):
    model = FILES["internvl_vision"][0]()
    params = random_params(model)
    state = state_of("internvl_vision", model, params)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    meta, found = folder.open_params(convert(tmp_path, "internvl_vision", state))
    assert any("patch_embed.proj.weight is of images" in note for note in meta["notes"])
    np.testing.assert_array_equal(found["patch_embed/kernel"], params["patch_embed"]["kernel"])


def test_a_tower_without_its_keys_is_named(tmp_path):
    torch_zip.write(tmp_path / "x.pth", {"conv1.weight": np.zeros((4, 3, 8, 8), np.float32)})
    with pytest.raises(UserError, match="must hold visual.conv1.weight; it does not"):
        from_torch.convert(tmp_path / "x.pth", layout="clip_visual")
