"""Names of CLIP models: full sizes without memory, ways back, and three files that make one model."""

import json

import numpy as np
import pytest

from invideo_jax import handover
from invideo_jax.errors import UserError
from invideo_jax.interop import folder, from_torch, infer, mapping, models, torch_zip
from invideo_jax.models import (
    alignment,
    clip_vit,
    stage2,
    text_towers,
    uniformer_v2,
    video_clip,
    video_encoder,
)
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.text_encoder import Bert, ClipText

PUBLISHED = dict(initial_temperature=0.07, temperature_range=(0.01, 1.0), logarithmic=True)


def pair(encoder, text, **options):
    return video_clip.VideoClip(video_clip.PooledEncoder(encoder), text, **options)


def listed(model, layout):
    """Key -> shape in order; the arrays are views of one zero."""
    zero = np.zeros((), np.float32)
    views = {path: np.broadcast_to(zero, shape) for path, shape in models.shapes(model).items()}
    state = mapping.to_state(views, layout=layout, cube=models.cube_of(model))
    return {key: tuple(x.shape) for key, x in state.items()}


def numbers(shapes):
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


# ----------------------------------------------------------------------------------------- full sizes


@pytest.mark.parametrize("size, width", [("1B", 1408), ("6B", 3200)])
def test_internvideo2_clip_has_the_published_keys(request, size, width):
    text = text_towers.build("llama", "7B", scan=True)
    found = listed(pair(video_encoder.build(size, scan=True), text), "internvideo2_clip_llama")
    assert next(iter(found)) == "temp" and found["temp"] == ()
    vision = {k: s for k, s in found.items() if k.startswith("vision_encoder.")}
    assert found["text_encoder.text_projection"] == (4096, 768)
    assert len(found) == 1 + len(vision) + 419
    assert numbers(found.values()) == 1 + numbers(vision.values()) + 6_692_417_536
    assert not any(word in key for key in found for word in ("img_pos", "decoder", "fc_norm"))
    # Of this the released file holds only what was trained.
    head = listed(video_clip.ClipHead(width), "internvideo2_clip_head")
    projector = "vision_encoder.clip_projector."
    assert head == {k: s for k, s in found.items() if k == "temp" or k.startswith(projector)}
    keys = request.getfixturevalue("shared") / "golden" / "keys"
    file = (keys / f"internvideo2_clip_vision_{size}.json").read_text()

    published = {k: tuple(shape) for k, (_, shape) in json.loads(file)["tensors"].items()}
    prefixed = {
        f"vision_encoder.{k.removeprefix('vision_encoder.')}": s for k, s in published.items()
    }
    assert list(vision.items()) == list(prefixed.items())


@pytest.mark.parametrize("size", ["B", "L"])
def test_viclip_has_the_published_keys(size):
    encoder = clip_vit.build(size, joint=True, scan=True)
    text = text_towers.build("clip", size, vocabulary=49408, scan=True)
    found = listed(pair(encoder, text), "viclip")
    width, patch, embed, words = dict(B=(768, 16, 512, 512), L=(1024, 14, 768, 768))[size]
    for key, shape in {
        "temp": (),
        "vision_encoder.class_embedding": (width,),
        "vision_encoder.positional_embedding": ((224 // patch) ** 2 + 1, width),
        "vision_encoder.temporal_positional_embedding": (1, 8, width),
        "vision_encoder.proj": (width, embed),
        "vision_encoder.conv1.weight": (width, 3, 1, patch, patch),
        "vision_encoder.transformer.resblocks.11.attn.in_proj_weight": (3 * width, width),
        "vision_encoder.ln_post.bias": (width,),
        "text_encoder.positional_embedding": (77, words),
        "text_encoder.text_projection": (words, embed),
        "text_encoder.transformer.resblocks.11.mlp.c_proj.weight": (words, 4 * words),
        "text_encoder.token_embedding.weight": (49408, words),
        "text_encoder.ln_final.weight": (words,),
    }.items():
        assert found[key] == shape, key
    depth = dict(B=12, L=24)[size]
    assert len(found) == 1 + (9 + 12 * depth) + (5 + 12 * 12)


@pytest.mark.parametrize("size", ["B", "L"])
def test_internvideo1s_model_has_the_published_keys(size):
    text = text_towers.build("clip", size, vocabulary=49408, scan=True)
    found = listed(
        pair(uniformer_v2.build(size, scan=True), text, **PUBLISHED), "internvideo1_clip"
    )
    width, embed, depth = dict(B=(768, 512, 12), L=(1024, 768, 24))[size]
    for key, shape in {
        "logit_scale": (),
        "visual_proj": (width, embed),
        "visual.transformer.temporal_cls_token": (1, 1, width),
        "visual.transformer.dpe.3.weight": (width, 1, 3, 3, 3),
        "visual.transformer.dec.3.ln_3.weight": (width,),
        "visual.transformer.balance": (width,),
        "visual_ln_post.weight": (width,),
        "token_embedding.weight": (49408, embed),
        "text_projection": (embed, embed),
        "ln_final.bias": (embed,),
    }.items():
        assert found[key] == shape, key
    vision = 1 + 5 + 2 + 12 * depth + 4 * (2 + 14) + 2
    assert len(found) == 1 + vision + (5 + 12 * 12)


# --------------------------------------------------------------------------------------- there and back


def trunk(**options):
    sizes = dict(frames=2, image_size=16, depth=2, layer_scale_float32=False)
    return video_encoder.build("Micro", **(sizes | options))


def llama():
    return LlamaText(256, 1, 2, 24, 32, 2, 128, 20, lora_rank=2, lora_alpha=4.0)


def clip_text():
    return ClipText(64, 2, 1, 96, 24, vocabulary=30, positions=12)


def clip_tower(**options):
    return clip_vit.ClipViT(64, 5, 1, 96, embed=24, patch=8, frames=2, image_size=16, **options)


MODELS = {
    "internvideo2_clip_llama": lambda: pair(trunk(), llama()),
    "viclip": lambda: pair(clip_tower(joint=True), clip_text()),
    "internvideo1_clip": lambda: pair(
        uniformer_v2.UniFormerV2(clip_tower()), clip_text(), **PUBLISHED
    ),
    "internvideo2_clip_head": lambda: video_clip.ClipHead(48, 4, 32),
}


def random_params(model):
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape, scale=0.2).astype(np.float32)
    return {path: draw(shape) for path, shape in models.shapes(model).items()}


def state_of(model, params, layout):
    leaves = mapping.to_state(params, layout=layout, cube=models.cube_of(model))
    return {k: np.asarray(x.read(), order="C") for k, x in leaves.items()}


@pytest.mark.parametrize("layout", MODELS)
def test_files_come_back_bit_for_bit(tmp_path, layout, capsys):
    model = MODELS[layout]()
    params = random_params(model)
    state = state_of(model, params, layout)
    file = dict(state)
    if (
        layout == "internvideo1_clip"
    ):  # published under a prefix, with a decoder that this model has not
        file = {f"clip.{k}": x for k, x in file.items()}
        file |= {"clip.text_mask_embedding": params["text/norm/scale"][None, None]}
        file |= {"caption_decoder.visual_queries": params["text/norm/scale"][None]}
    torch_zip.write(tmp_path / "x.pth", file)
    argv = [f"--layout={layout}", f"--input={tmp_path / 'x.pth'}", f"--output={tmp_path / 'ours'}"]
    assert from_torch.main([*argv, "--size=Micro", "--old_frames=2", "--old_image_size=16"]) == 0
    told = capsys.readouterr().out
    assert ("of no use here: text_mask_embedding, caption_decoder" in told) == (
        len(file) > len(state)
    )
    meta, lazy = folder.open_params(tmp_path / "ours")
    again = models.make(meta)
    assert again == model.clone()
    back = state_of(again, lazy.leaves, layout)
    assert list(back) == list(state)
    assert all(back[key].tobytes() == x.tobytes() for key, x in state.items())


# ------------------------------------------------------------------------- three files make one model


def stage_2():
    vision = alignment.AlignedEncoder(
        trunk(image_positions="separate"), clip=alignment.HeadsSpec((1,), 12)
    )
    return stage2.Stage2(vision, Bert(32, 2, 2, 40, 1, vocabulary=30, positions=12), 24)


RULES = dict(
    rename=("^trunk/->vision/encoder/", "^head/pool/->vision/encoder/pool/", "^head/temperature->temperature"),
    leftover=("^trunk/pool/", "^trunk/image_position_embedding$"),
)  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The three folders, by the documented commands; and the numbers of the three files' models."""
    place, values = tmp_path_factory.mktemp("files"), {}

    def bring(name, model, layout, written, *options):
        values[name] = random_params(model)
        state = state_of(model, values[name], written)
        torch_zip.write(place / f"{name}.pth", state)
        argv = [f"--layout={layout}", f"--input={place / name}.pth", f"--output={place / name}"]
        assert from_torch.main([*argv, "--size=Micro", *options]) == 0

    given = ("--old_frames=2", "--old_image_size=16")
    drop = "--drop=text_encoder.*,vision_proj.*,text_proj.*,itm_head.*,temp"
    bring("trunk", stage_2(), "internvideo2_encoder", "internvideo2_stage2", *given, drop)
    bring("text", llama(), "internvl_text", "internvl_text")
    bring(
        "head", video_clip.ClipHead(48, 4, 32), "internvideo2_clip_head", "internvideo2_clip_head"
    )
    return place, values


def planned(place, *, frames=2, **changes):
    source = handover.open_source(f"trunk={place}/trunk;head={place}/head;text={place}/text")
    model = pair(trunk(frames=frames), llama())
    grid = dict(grid=model.vision.encoder.grid)
    table = handover.plan(
        models.abstract(model), source.shapes, about=source.about, key="stages.clip.init", **grid,
        **(RULES | changes),
    )  # fmt: skip
    return model, source, table


def test_three_imported_folders_make_one_model_with_nothing_missing(imported):
    place, values = imported
    model, source, table = planned(place)
    assert {row.path for row in table.rows} == set(models.shapes(model))
    assert {row.transform for row in table.rows} == {"copy"}
    assert set(table.left) == {
        p for p in source.shapes if p.startswith(("trunk/pool/", "trunk/image_position"))
    }
    assert "vision/encoder/pool/out/kernel" in str(table)
    for row in table.rows:
        part, _, path = row.source.partition("/")
        name = f"vision/encoder/{path}" if part == "trunk" else path
        assert np.array_equal(source.get(row.source), values[part][name]), row.path
        if row.path.startswith("vision/encoder/pool/") or row.path == "temperature":
            assert part == "head", row.path


def test_longer_clips_only_interpolate_positions(imported):
    place, _ = imported
    _, _, table = planned(place, frames=4, old_frames=2)
    (moved,) = [row for row in table.rows if row.transform != "copy"]
    assert moved.path == "vision/encoder/position_embedding"
    assert (moved.options["old"], moved.options["new"]) == ([2, 2, 2], [4, 2, 2])


def test_what_no_rule_speaks_of_is_an_error(imported):
    place, _ = imported
    with pytest.raises(UserError, match="have no use: trunk/image_position_embedding"):
        planned(place, leftover=("^trunk/pool/",))
    with pytest.raises(UserError, match="must not get one name"):
        planned(place, leftover=("^trunk/image_position_embedding$",))
    with pytest.raises(UserError, match="have no source: vision/encoder/pool"):
        planned(place, leftover=(*RULES["leftover"], "^head/pool/"))


def test_a_released_file_alone_is_no_whole_model(imported):
    place, _ = imported
    with pytest.raises(UserError, match="must hold vision_encoder.patch_embed.proj.weight"):
        from_torch.convert(
            place / "head.pth", layout="internvideo2_clip_llama", given=infer.Given(2, 16, "Micro")
        )
