"""BEATs and stage 2 with sound, from and to PyTorch: published names, files as they are handed around."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from invideo_jax.errors import UserError
from invideo_jax.interop import folder, from_torch, infer, mapping, models, reading, to_torch
from invideo_jax.models import alignment, audio_encoder, stage2
from invideo_jax.models.audio_encoder import Beats
from invideo_jax.models.text_encoder import Bert

AUDIOVISUAL = "internvideo2_stage2_audiovisual"
LARGE = dict(width=1024, depth=24, heads=16, mlp_width=4096, fusion_from=19)
SMALL = Beats(
    16, 3, 2, 24, patch=4, mels=8, embed=12, conv_positions=6, conv_groups=4, buckets=16, max_distance=20
)  # fmt: skip
BERT = Bert(16, 2, 2, 24, fusion_from=1, vocabulary=20, positions=8)


def state_of(model, layout, seed=0, kind=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(kind)
    params = {path: draw(shape) for path, shape in models.shapes(model).items()}
    leaves = mapping.to_state(params, layout=layout, cube=models.cube_of(model))
    return params, {key: np.asarray(x.read(), order="C") for key, x in leaves.items()}


def listed(model, layout):
    """Key -> shape, without memory."""
    views = {
        path: np.broadcast_to(np.zeros((), np.float32), shape)
        for path, shape in models.shapes(model).items()
    }
    state = mapping.to_state(views, layout=layout, cube=models.cube_of(model))
    return {key: list(x.shape) for key, x in state.items()}


def audiovisual(**options):
    vision = alignment.build(
        "Nano", frames=2, image_size=16, mae_layers=0, clip_layers=1, clip_width=12, final_width=10
    )
    settings = dict(width=6, audio=SMALL, fusion_width=14, views=("video", "audio", "audio_video"))
    return stage2.Stage2(vision, BERT, **(settings | options))


# ---- BEATs --------------------------------------------------------------------------------------


def test_the_published_encoder_has_these_keys_and_shapes():
    found = listed(audio_encoder.build("beats", "B"), "beats")
    layer = "encoder.layers.{}."
    each = {
        "self_attn.grep_a": [1, 12, 1, 1],
        "self_attn.grep_linear.weight": [8, 64],
        "self_attn.grep_linear.bias": [8],
        "self_attn.relative_attention_bias.weight": [320, 12],
        "fc1.weight": [3072, 768],
        "fc1.bias": [3072],
        "fc2.weight": [768, 3072],
        "fc2.bias": [768],
    }
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        each |= {f"self_attn.{part}.weight": [768, 768], f"self_attn.{part}.bias": [768]}
    for part in ("self_attn_layer_norm", "final_layer_norm"):
        each |= {f"{part}.{name}": [768] for name in ("weight", "bias")}
    want = {
        "post_extract_proj.weight": [768, 512],
        "post_extract_proj.bias": [768],
        "patch_embedding.weight": [512, 1, 16, 16],
        "encoder.pos_conv.0.bias": [768],
        "encoder.pos_conv.0.weight_g": [1, 1, 128],
        "encoder.pos_conv.0.weight_v": [768, 48, 128],
        "encoder.layer_norm.weight": [768],
        "encoder.layer_norm.bias": [768],
        "layer_norm.weight": [512],
        "layer_norm.bias": [512],
    }
    want |= {layer.format(i) + key: shape for i in range(12) for key, shape in each.items()}
    assert found == want
    own = sum(math.prod(s) for key, s in want.items() if "relative" not in key) + 320 * 12
    assert own == models.count(audio_encoder.build("beats", "B")) == 90_311_792


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(gated=False),
        dict(buckets=0, gated=False, embed=16, patch_bias=True, conv_positions=5),
    ],
    ids=["all", "no gate", "no table"],
)
def test_weights_come_back_bit_for_bit(changes, kind):
    model = SMALL.clone(**changes)
    params, state = state_of(model, "beats", kind=kind)
    back = mapping.to_leaves(state, layout="beats", expected=models.shapes(model))
    for path, value in params.items():
        assert back[path].read().tobytes() == value.tobytes(), path
    again = mapping.to_state(back, layout="beats", cube=(1, 1, 1))
    assert list(again) == list(state)
    assert all(again[key].read().tobytes() == x.tobytes() for key, x in state.items())
    given = infer.Given(values=dict(heads=2, mels=8, max_distance=20))
    told = infer.model_text({key: x.shape for key, x in state.items()}, "beats", given)
    assert models.make(told) == model.clone()


def test_where_the_numbers_lie():
    params, state = state_of(SMALL, "beats")
    kernel = params["patch_embed/kernel"].reshape(4, 4, 12)  # frame, mel bin, output
    np.testing.assert_array_equal(state["patch_embedding.weight"][5, 0], kernel[..., 5])
    conv = params["position_kernel"]  # place, input of the group, output
    np.testing.assert_array_equal(state["encoder.pos_conv.0.weight_v"][3, 2], conv[:, 2, 3])
    np.testing.assert_array_equal(
        state["encoder.pos_conv.0.weight_g"][0, 0], params["position_scale"]
    )
    for i in range(3):
        attention = f"encoder.layers.{i}.self_attn."
        table = state[attention + "relative_attention_bias.weight"]
        np.testing.assert_array_equal(table, params["relative_bias"])
        query = params["stack/blocks/query/kernel"][i]
        np.testing.assert_array_equal(state[attention + "q_proj.weight"], query.T)
        scale = params["stack/blocks/gate_scale"][i]
        np.testing.assert_array_equal(state[attention + "grep_a"][0, :, 0, 0], scale)


def test_a_table_that_is_not_shared_is_an_error_and_one_copy_is_enough():
    params, state = state_of(SMALL, "beats")
    read = lambda state: mapping.to_leaves(state, layout="beats", expected=models.shapes(SMALL))
    key = "encoder.layers.{}.self_attn.relative_attention_bias.weight".format
    with pytest.raises(UserError, match=r"layers.2.*must hold the same numbers as the array"):
        read(state | {key(2): state[key(2)] + 1})
    once = {k: x for k, x in state.items() if k not in (key(1), key(2))}
    np.testing.assert_array_equal(read(once)["relative_bias"].read(), params["relative_bias"])


def cfg(**changes):
    return dict(
        input_patch_size=4, embed_dim=12, conv_bias=False, encoder_layers=3, encoder_embed_dim=16,
        encoder_ffn_embed_dim=24, encoder_attention_heads=2, activation_fn="gelu", dropout=0.0,
        layer_norm_first=False, deep_norm=True, conv_pos=6, conv_pos_groups=4, num_buckets=16,
        relative_position_embedding=True, max_distance=20, gru_rel_pos=True, encoder_layerdrop=0.05,
    ) | changes  # fmt: skip


def test_a_published_file_is_built_from_its_own_settings(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    _, state = state_of(SMALL, "beats")
    spelt = {
        key.replace("0.weight_g", "0.parametrizations.weight.original0"): torch.from_numpy(x)
        for key, x in state.items()
    }
    spelt["predictor.weight"] = torch.zeros(527, 16)
    settings = cfg(deep_norm=False, layer_norm_first=True)
    torch.save({"cfg": settings, "model": spelt}, tmp_path / "x.pt")
    command = ["--layout=beats", f"--input={tmp_path / 'x.pt'}", "--model.mels=8"]
    assert from_torch.main([*command, f"--output={tmp_path / 'ours'}"]) == 0
    said = capsys.readouterr().out
    assert "built from the file's own settings, 'cfg'" in said and "deep_norm = False" in said
    assert "of no use here: predictor.weight" in said
    meta, lazy = folder.open_params(tmp_path / "ours")
    want = SMALL.clone(deep_norm=False, layer_norm_first=True)
    assert models.make(meta) == want
    back = mapping.to_state(lazy.leaves, layout="beats", cube=(1, 1, 1))
    assert all(back[key].read().tobytes() == x.tobytes() for key, x in state.items())
    given = infer.Given(config=cfg(activation_fn="gelu_fast"))
    shapes = {key: x.shape for key, x in state.items()}
    assert infer.model_text(shapes, "beats", given)["arguments"]["activation"] == "gelu_tanh"
    silent = infer.model_text(shapes, "beats", infer.Given(config={"dropout": 0.1}))["arguments"]
    assert (silent["deep_norm"], silent["max_distance"]) == (False, 1280)
    assert reading.settings(tmp_path / "x.pt", "nothing") == {}


@pytest.mark.parametrize("layout", ["beats", AUDIOVISUAL])
def test_the_command_lines_give_a_file_back_bit_for_bit(tmp_path, capsys, layout):
    model = SMALL if layout == "beats" else audiovisual()
    _, state = state_of(model, layout)
    save_file(state, tmp_path / "x.safetensors")
    options = ["--model.mels=8", "--model.max_distance=20"]
    if layout == AUDIOVISUAL:
        options += ["--model.text_heads=2", "--old_frames=2", "--size=Nano"]
    command = [f"--layout={layout}", f"--input={tmp_path / 'x.safetensors'}", *options]
    assert from_torch.main([*command, f"--output={tmp_path / 'ours'}"]) == 0
    meta, _ = folder.open_params(tmp_path / "ours")
    # The last attributes change no number: a file cannot tell them.
    assert models.describe(models.make(meta)) == models.describe(model)
    command = [f"--workdir={tmp_path / 'ours'}", f"--layout={layout}", "--output"]
    assert to_torch.main([*command, str(tmp_path / "theirs")]) == 0
    assert "not checked: this package has no PyTorch module" in capsys.readouterr().out
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(back) == set(state)
    assert all(back[key].tobytes() == x.tobytes() for key, x in state.items())
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["layout"] == layout and not (tmp_path / "theirs" / "model.py").exists()
    if layout == AUDIOVISUAL:
        alone = [command[0], "--layout=beats", f"--output={tmp_path / 'alone'}"]
        assert to_torch.main(alone) == 0
        for key, x in load_file(tmp_path / "alone" / "model.safetensors").items():
            assert x.tobytes() == state[f"audio_encoder.{key}"].tobytes(), key
    again = [f"--layout={layout}", f"--input={tmp_path / 'theirs'}"]
    assert from_torch.main([*again, f"--output={tmp_path / 'again'}"]) == 0
    assert models.make(folder.open_params(tmp_path / "again")[0]) == models.make(meta)


# ---- stage 2 with sound -------------------------------------------------------------------------


def model_6b(**options):
    vision = alignment.build("6B", frames=4, mae_layers=0, scan=True)
    audio = audio_encoder.build("beats", "B", scan=True)
    settings = dict(width=768, audio=audio, fusion_width=768, views=("video", "audio_video"))
    return stage2.Stage2(vision, Bert(**LARGE, scan=True), **(settings | options))


def test_the_6b_model_has_the_published_keys_and_shapes(request):
    model = model_6b()
    found = listed(model, AUDIOVISUAL)
    for key, shape in {
        "temp": [],
        "av_concat_vision_proj.0.weight": [768, 3200],
        "av_concat_vision_proj.1.bias": [768],
        "av_concat_audio_proj.0.weight": [768, 768],
        "av_concat_audio_proj.1.weight": [768],
        "audio_proj.weight": [768, 768],
        "av_fusion.weight": [768, 1536],
        "avtm_head.weight": [2, 1024],
        "itm_head.bias": [2],
        "vision_proj.weight": [768, 768],
        "text_proj.weight": [768, 1024],
        "text_encoder.bert.encoder.layer.19.crossattention.self.key.weight": [1024, 768],
        "text_encoder.bert.encoder.layer.23.crossattention.self.value.weight": [1024, 768],
        "audio_encoder.encoder.layers.11.self_attn.relative_attention_bias.weight": [320, 12],
        "audio_encoder.patch_embedding.weight": [512, 1, 16, 16],
    }.items():
        assert found[key] == shape, key
    assert "atm_head.weight" not in found and not any("img_pos_embed" in k for k in found)
    cut = "audio_encoder."
    audio = {k.removeprefix(cut): s for k, s in found.items() if k.startswith(cut)}
    assert audio == listed(model.audio, "beats")
    # 6B tower 5,973,... and its heads; BERT with five fusion blocks; BEATs; projections and heads
    parts = {
        name: models.count(part)
        for name, part in (("vision", model.vision), ("audio", model.audio))
    }
    rest = 768 * (3200 + 1 + 2) + 768 * (768 + 1) * 3 + 2 * 768 + 768 * 1025 + 768 * 1537
    text = sum(
        math.prod(shape) for path, shape in models.shapes(model).items() if path.startswith("text/")
    )
    assert models.count(model) == sum(parts.values()) + text + rest + 2 * (2 * 1025) + 1
    silent = listed(model_6b(audio=None, views=("video",)), AUDIOVISUAL)
    lacking = set(found) - set(silent)
    assert all(k.startswith(("audio_", "av_concat_audio", "av_fusion", "avtm")) for k in lacking)
    keys = request.getfixturevalue("shared") / "golden" / "keys"
    vision = json.loads((keys / "internvideo2_stage2_vision_6B.json").read_text())["tensors"]
    ours = {k[15:]: s for k, s in found.items() if k.startswith("vision_encoder.")}
    assert ours == {key: shape for key, (_, shape) in vision.items()}
    text = json.loads((keys / "internvideo2_stage2_model_1B_bertlarge.json").read_text())["tensors"]
    crossed = ("crossattention.self.key.weight", "crossattention.self.value.weight")
    theirs = {k: s for k, (_, s) in text.items() if k.startswith("text_encoder.")}
    ours = {k: s for k, s in found.items() if k.startswith("text_encoder.")}
    assert list(ours) == list(theirs)
    differ = {k for k in ours if ours[k] != theirs[k]}
    assert differ == {k for k in ours if k.endswith(crossed)}


@pytest.mark.parametrize(
    "options",
    [
        dict(views=("video", "audio_video")),
        dict(views=("audio",), joint=False),
        dict(audio=None, views=("video",)),
    ],
    ids=["published", "audio alone", "no sound"],
)
def test_stage_2_with_sound_comes_back_bit_for_bit(options):
    model = audiovisual(**options)
    params, state = state_of(model, AUDIOVISUAL)
    back = mapping.to_leaves(state, layout=AUDIOVISUAL, expected=models.shapes(model))
    for path, value in params.items():
        assert back[path].read().tobytes() == value.tobytes(), path
    assert ("av_fusion.weight" in state) == (model.joint and model.audio is not None)
    heads = dict(video="itm_head", audio="atm_head", audio_video="avtm_head")
    for view, head in heads.items():
        assert (f"{head}.weight" in state) == (view in model.views)
    given = infer.Given(2, 16, "Nano", {"text_heads": 2})
    told = infer.model_text({k: x.shape for k, x in state.items()}, AUDIOVISUAL, given)
    again = models.make(told)
    assert again.views == model.views and again.fusion_width == 14
    assert models.shapes(again) == models.shapes(model)


def test_the_visual_model_keeps_its_layout():
    model = audiovisual(audio=None, views=("video",), fusion_width=0)
    _, state = state_of(model, "internvideo2_stage2")
    assert not any(key.startswith(("av_", "audio_")) for key in state)
    with pytest.raises(UserError, match="Layouts of this model: internvideo2_stage2_audiovisual"):
        state_of(audiovisual(), "internvideo2_stage2")
