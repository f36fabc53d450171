"""`tests.golden` on files of other arguments than those at hand, which PyTorch computes here; and on spoilt ones."""

import numpy as np
import pytest

pytest.importorskip("torch")
from safetensors.numpy import load_file

from tests import golden, originals
from tests.interop import variants, variants_mae

SMALL = dict(
    embed_dim=48, num_heads=3, depth=3, patch_size=7, img_size=28, num_frames=4, mlp_ratio=3.3,
    attn_pool_num_heads=6, clip_embed_dim=40,
)  # fmt: skip
IMAGE = {k: v for k, v in SMALL.items() if k != "num_frames"}
STUDENT = SMALL | dict(clip_teacher_embed_dim=24, clip_teacher_final_dim=20)
HF = dict(
    image_size=16, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_intermediate_size=40,
    decoder_num_attention_heads=3,
)  # fmt: skip
# name -> (writer, constructor arguments, options of the writer)
FAST = {
    "teacher_blocks_none": (
        variants.write_teacher,
        SMALL | dict(depth=5, clip_return_index=[3, 0], clip_norm_type="none", return_attn=False),
        {},
    ),
    "clip_separate": (
        variants.write_clip,
        SMALL | dict(sep_pos_embed=True, num_frames=3, init_values=0),
        {},
    ),
    "teacher_videomae": (
        variants_mae.write_mae_teacher,
        dict(
            img_size=[32, 32], patch_size=8, embed_dim=32, depth=5, num_heads=4, mlp_ratio=3, qk_scale=0.3,
            init_values=0.1, all_frames=6, tubelet_size=3, mae_norm_type="none", mae_return_layer=2,
            mae_return_interval=2,
        ),
        {},
    ),
}  # fmt: skip
SLOW = {
    "stage1_separate_tubelet2_unscaled": (
        variants.write_student,
        STUDENT
        | dict(
            sep_pos_embed=True, tubelet_size=2, qkv_bias=True, qk_normalization=False, init_values=None,
            mae_teacher_embed_dim=28, clip_norm_type="none", mae_norm_type="none", clip_return_layer=2,
        ),
        {},
    ),
    "stage1_intervals_no_final": (
        variants.write_student,
        STUDENT
        | dict(
            depth=5, num_frames=3, img_size=[21, 21], patch_size=[7, 7], init_values=0.1, clip_return_layer=3,
            clip_teacher_final_dim=0, clip_student_return_interval=2, mae_teacher_embed_dim=28,
            mae_return_layer=2, mae_student_return_interval=3.5,
        ),
        dict(train=True),
    ),
    "distillation_blocks_mlp": (
        variants.write_student,
        STUDENT
        | dict(
            depth=5, in_chans=1, init_values=0, clip_return_layer=3, clip_student_return_index=[4, 0, 2],
            clip_student_decoder="MLP_Decoder",
        ),
        {},
    ),
    "distillation_linear": (variants.write_student, STUDENT, dict(learn=False)),
    "vision_image_table": (
        variants.write_vision,
        STUDENT
        | dict(num_frames=3, sep_image_video_pos_embed=True, clip_return_layer=2, clip_student_return_interval=2),
        {},
    ),
    "vision_image_table_tubelet2": (
        variants.write_vision,
        STUDENT
        | dict(tubelet_size=2, sep_image_video_pos_embed=True, clip_teacher_final_dim=0, init_values=0, qkv_bias=True),
        {},
    ),
    "vision_one_table": (variants.write_vision, STUDENT | dict(num_frames=5, clip_norm_type="none"), {}),
    "teacher_separate": (
        variants.write_teacher,
        SMALL
        | dict(depth=5, clip_return_layer=3, clip_return_interval=2, tubelet_size=2, sep_pos_embed=True),
        {},
    ),
    "internvl": (
        variants.write_teacher,
        IMAGE | dict(depth=5, clip_return_layer=2, clip_return_interval=3, init_values=0.1, qkv_bias=True),
        dict(frames=3),
    ),
    "internvl_none": (
        variants.write_teacher,
        IMAGE | dict(clip_return_layer=2, init_values=0, clip_norm_type="none", return_attn=False),
        dict(frames=3),
    ),
    "clip_tubelet2": (variants.write_clip, SMALL | dict(tubelet_size=2, init_values=None), {}),
    "videomae_scaled_unbiased": (
        variants_mae.write_mae,
        dict(
            img_size=[16, 16], patch_size=8, encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2,
            decoder_num_classes=768, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=3, mlp_ratio=3,
            qkv_bias=False, init_values=0.1, tubelet_size=4, qk_scale=0.2,
        ),
        {},
    ),
    "videomae_defaults": (
        variants_mae.write_mae,
        dict(
            img_size=16, patch_size=8, encoder_embed_dim=32, encoder_depth=3, encoder_num_heads=2,
            decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=3, decoder_num_classes=384,
        ),
        {},
    ),
    "videomae_transformers_last_norm": (
        variants_mae.write_hf,
        HF | dict(use_mean_pooling=False, norm_pix_loss=False, qkv_bias=False, layer_norm_eps=1e-6),
        {},
    ),
    "plain_separate": (
        variants.write_classifier,
        SMALL | dict(sep_pos_embed=True, num_classes=5, init_values=None, qk_normalization=False),
        {},
    ),
    "attentive_tubelet2": (
        variants.write_classifier,
        SMALL | dict(num_classes=7, tubelet_size=2, clip_embed_dim=24),
        dict(variant="attentive"),
    ),
}  # fmt: skip
MERGES = "proj cls_avg1 cls_avgN cls_avg1_proj cls_avgN_proj".split()
STATES = {
    "fresh": {},
    "trained": dict(after=True),
    "trained_not_fresh": dict(after=True, fresh=False),
}
for _merge in MERGES:
    for _norm in ("kaiming_BN", "BN", "LN"):
        for _state, _options in STATES.items() if "BN" in _norm else [("fresh", {})]:
            _arguments = SMALL | dict(
                depth=2, num_frames=3, num_classes=5, merge_method=_merge, merge_norm=_norm
            )
            _case = (variants.write_classifier, _arguments, dict(variant="cat") | _options)
            _fast = (_merge, _norm, _state) == ("cls_avgN_proj", "BN", "trained")
            (FAST if _fast else SLOW)[f"cat_{_merge}_{_norm}_{_state}"] = _case


def check(folder, name, seed):
    write_file, arguments, options = (FAST | SLOW)[name]
    return golden.check(write_file(folder, name, arguments, seed=seed, **options))


@pytest.mark.parametrize("name", FAST)
def test_other_arguments_hold(name, tmp_path):
    assert check(tmp_path, name, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_arguments_hold(name, tmp_path):
    if "transformers" in name:
        pytest.importorskip("transformers")
    assert check(tmp_path, name, seed=4)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small file like one that holds, and its tensors."""
    write_file, arguments, options = FAST["teacher_videomae"]
    arguments = arguments | dict(depth=2, mae_return_interval=1)
    file = write_file(tmp_path_factory.mktemp("good"), "good", arguments, seed=5, **options)
    return file, load_file(file)


def _spoilt(good, name, config=None, **tensors):
    file, all_tensors = good
    kept = {k: v for k, v in (all_tensors | tensors).items() if v is not None}
    return variants.changed(file, name, kept, config or {})


def test_a_changed_output_is_found(good, capsys):
    key = "out/z_intended_attention_over_tokens"
    wrong = good[1][key].copy()
    wrong[0, 0, 0, 0] += 1e-4
    assert golden.main([str(_spoilt(good, "changed", **{key: wrong}))]) == 1
    assert f"in {key}" in capsys.readouterr().out


def test_a_missing_state_tensor_is_found(good, capsys):
    file = _spoilt(good, "missing", **{"state/blocks.1.mlp.fc1.bias": None})
    assert golden.main([str(file)]) == 1
    assert "blocks.1.mlp.fc1.bias" in capsys.readouterr().out


def test_an_unknown_argument_is_found(good, capsys):
    assert golden.main([str(_spoilt(good, "unknown", {"window_size": 7}))]) == 1
    assert "window_size=7 is not known here" in capsys.readouterr().out


def test_a_group_that_nobody_computes_is_found(good, capsys):
    file = _spoilt(good, "group", **{"probe/logits": np.zeros(3, np.float32)})
    assert golden.main([str(file)]) == 1
    assert "could not check probe/logits" in capsys.readouterr().out


def test_defaults_are_taken_for_arguments_left_out():
    full = originals.complete("distillation", dict(depth=3, img_size=[28, 28]))
    assert (full["depth"], full["img_size"], full["init_values"]) == (3, 28, 1e-5)
    with pytest.raises(ValueError, match="must be square"):
        originals.complete("clip", dict(patch_size=[14, 16]))
