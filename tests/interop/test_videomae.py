"""VideoMAE both ways, and parity with transformers and with the stored numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import video_mae
from tests import golden, golden_video_mae

CUBE = (2, 8, 8)


def small(**options):
    return video_mae.build("Micro", **(dict(image_size=16, frames=4) | options))


def abstract(model):
    return sharding.unbox(jax.eval_shape(lambda: video_mae.init(model, jax.random.key(0))))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(model))


@pytest.mark.parametrize("layout", ["videomae", "videomae_hf"])
@pytest.mark.parametrize("options", [{}, dict(last_norm=False, qkv_bias=False, depth=3)])
def test_there_and_back_is_bit_identical(layout, options):
    model = small(**options)
    params = random_params(model)
    state = to_state_dict(params, layout=layout, cube=CUBE)
    back = to_params(state, layout=layout, expected=abstract(model))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = to_state_dict(back, layout=layout, cube=CUBE)
    assert list(again) == list(state)
    assert all(again[k].tobytes() == state[k].tobytes() for k in state)


def test_layer_scale_has_names_in_the_original_only():
    params = random_params(small(layer_scale=0.1))
    state = to_state_dict(params, layout="videomae", cube=CUBE)
    np.testing.assert_array_equal(
        state["encoder.blocks.1.gamma_2"], params["encoder"]["stack"]["blocks"]["scale2"][1]
    )
    with pytest.raises(UserError, match="they differ in decoder/blocks/scale1"):
        to_state_dict(params, layout="videomae_hf", cube=CUBE)


def test_kernels_are_turned_as_the_convention_says():
    params = random_params(small())
    state = to_state_dict(params, layout="videomae", cube=CUBE)
    attention = params["encoder"]["stack"]["blocks"]["attention"]
    fused = np.concatenate([attention[n]["kernel"][1].T for n in ("query", "key", "value")])
    np.testing.assert_array_equal(state["encoder.blocks.1.attn.qkv.weight"], fused)
    conv, kernel = (
        state["encoder.patch_embed.proj.weight"],
        params["encoder"]["patch_embed"]["kernel"],
    )
    assert conv.shape == (32, 3, 2, 8, 8)
    t, h, w, c = 1, 2, 5, 2
    np.testing.assert_array_equal(conv[:, c, t, h, w], kernel[((t * 8 + h) * 8 + w) * 3 + c])


@pytest.mark.parametrize(
    "file, layout, size",
    [
        ("videomae_pretrain_small", "videomae", "S"),
        ("videomae_pretrain_base", "videomae", "B"),
        ("videomae_pretrain_large", "videomae", "L"),
        ("videomae_pretrain_huge", "videomae", "H"),
        ("hf_videomae_pretrain_small_tf5", "videomae_hf", "S"),
        ("hf_videomae_pretrain_base_tf5", "videomae_hf", "B"),
    ],
)
def test_keys_and_their_order_of_full_sizes(shared, file, layout, size):
    listed = json.loads((shared / "golden" / "keys" / f"{file}.json").read_text())["tensors"]
    narrow = dict(width=8, heads=1, mlp_width=8, patch=2, image_size=4)
    narrow |= dict(decoder_width=8, decoder_heads=1, decoder_mlp_width=8)
    # Keys follow from the depth alone; shapes too are compared where the memory for it is small.
    model = video_mae.build(size, scan=True, **({} if size == "S" else narrow))
    state = to_state_dict(
        random_params(model),
        layout=layout,
        cube=(model.encoder.tubelet, model.encoder.patch, model.encoder.patch),
    )
    assert list(state) == list(listed)
    if size == "S":
        assert {k: list(v.shape) for k, v in state.items()} == {k: v[1] for k, v in listed.items()}


def test_version_4_spelling_of_transformers_is_read():
    model = small()
    params = random_params(model)
    state = to_state_dict(params, layout="videomae_hf", cube=CUBE)
    old = {
        k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v
        for k, v in state.items()
    }
    assert set(old) != set(state)
    back = to_params(old, layout="videomae_hf", expected=abstract(model))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_missing_extra_and_misshapen_keys_are_explained():
    model = small()
    state = to_state_dict(random_params(model), layout="videomae", cube=CUBE)
    read = lambda s, m=model: to_params(s, layout="videomae", expected=abstract(m))
    short = {k: v for k, v in state.items() if k != "decoder.head.bias"}
    with pytest.raises(UserError, match="Missing: decoder.head.bias"):
        read(short)
    with pytest.raises(UserError, match="Not used: extra.weight"):
        read(state | {"extra.weight": np.zeros(3)})
    with pytest.raises(UserError, match="Not used: encoder.blocks.1.attn.proj.bias"):
        read(state, small(depth=1))
    with pytest.raises(UserError, match=r"the model has \(24, 32\)|Check patch, tubelet"):
        read(state, small(patch=2))
    with pytest.raises(UserError, match="Check the model's size"):
        read(state, small(mlp_width=64))
    with pytest.raises(UserError, match="layout='videomea'. Did you mean \"videomae\""):
        to_params(state, layout="videomea", expected=abstract(model))


def hf_pair(**config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = dict(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )
    torch.manual_seed(0)
    theirs = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**(settings | config))
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return torch, theirs, settings | config


@pytest.mark.parametrize("mean_pooling, eps", [(False, 1e-6), (True, 1e-12)])
def test_loss_and_every_gradient_equal_transformers(mean_pooling, eps):
    torch, theirs, config = hf_pair(use_mean_pooling=mean_pooling, layer_norm_eps=eps)
    model = golden_video_mae.hf_model(config)
    video = np.random.default_rng(0).normal(size=(2, 4, 32, 32, 3)).astype(np.float32)
    mask = np.tile(np.random.default_rng(1).permutation(16) < 12, (2, 2))
    found = theirs(
        torch.from_numpy(video.transpose(0, 1, 4, 2, 3).copy()),
        bool_masked_pos=torch.from_numpy(mask),
    )
    found.loss.backward()
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    params, back = golden_video_mae._params(model, state, "videomae_hf")
    visible, hidden = golden_video_mae._ids(mask)
    loss, grads = golden_video_mae.loss_and_grad(model, params, jnp.asarray(video), visible, hidden)
    np.testing.assert_allclose(float(loss), found.loss.item(), atol=1e-5)
    wanted = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.grad is not None}
    ours = back(grads)
    assert set(ours) == set(wanted) and len(wanted) > 70
    for key, want in wanted.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(ours[key], want, atol=1e-5 * max(scale, 1e-2), err_msg=key)
    with torch.no_grad():  # and the way back loads strictly
        theirs.load_state_dict({k: torch.from_numpy(v) for k, v in back(params).items()})


def test_stored_numbers_of_the_original_models_hold(shared, capsys):
    files = sorted((shared / "golden").glob("e_videomae_pretrain_*.json"))
    assert len(files) == 2 and golden.main([str(f) for f in files]) == 0
    assert "2 of 2 files hold" in capsys.readouterr().out


def test_golden_command_fails_beyond_a_bound_and_for_what_it_cannot_check(tmp_path, capsys):
    model = small()
    config = dict(img_size=16, patch_size=8, encoder_embed_dim=32, encoder_depth=2)
    config |= dict(encoder_num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    config |= dict(mlp_ratio=4, qkv_bias=True, tubelet_size=2)
    params = random_params(small(decoder_mlp_width=64, mlp_width=128))
    rng = np.random.default_rng(0)
    mask = np.tile(np.array([True, False, True, True]), (1, 2))
    video = rng.normal(size=(1, 3, 4, 16, 16)).astype(np.float32)
    state = to_state_dict(params, layout="videomae", cube=CUBE)
    inputs = {"video": video, "mask": mask}
    meta = {"config": config, "what": "eps 1e-6", "tensors": {}}
    right = golden_video_mae.run_original(meta, state, inputs, []).tensors["out/pred"]

    def verdict(extra, config=config):
        tensors = {f"state/{k}": v for k, v in state.items()}
        tensors |= {f"in/{k}": v for k, v in inputs.items()} | extra
        save_file(tensors, tmp_path / "e.safetensors")
        (tmp_path / "e.json").write_text(json.dumps(meta | {"config": config}))
        code = golden.main([str(tmp_path / "e.json")])
        return code, capsys.readouterr().out

    right = np.asarray(right)
    assert verdict({"out/pred": right})[0] == 0
    code, said = verdict({"out/pred": right + np.float32(1e-3)})
    assert code == 1 and "FAIL out/" in said
    code, said = verdict({"out/pred": right, "adamw/loss_after2": np.zeros(1, np.float32)})
    assert code == 1 and "could not check adamw/loss_after2" in said
    code, said = verdict({"out/pred": right}, config | {"drop_rate": 0.5})
    assert code == 1 and "drop_rate must be one of" in said
    assert model.encoder.grid == (2, 2, 2)
