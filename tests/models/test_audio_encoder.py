"""Audio towers: BEATs against a PyTorch reference and WavLM's attention, padding, dropout, sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.models import audio_encoder, beats, sizes
from invideo_jax.models.audio_encoder import AudioViT, Beats

SMALL = dict(width=16, depth=2, heads=2, mlp_width=24, patch=4, mels=8, scan=True)
BEATS = Beats(**SMALL, embed=12, conv_positions=6, conv_groups=4, buckets=16, max_distance=20)
VIT = AudioViT(**SMALL)
SOME = np.array([30, 9, 0], np.int32)
B, F = 3, 30  # 7 patches in time, 2 in frequency, 2 frames left over


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), models.abstract(model)
    )


def sound(seed=1, frames=F):
    return np.random.default_rng(seed).normal(size=(B, frames, 8)).astype(np.float32)


def run(model, params, *inputs, **options):
    return jax.jit(lambda p, a: model.apply({"params": p}, *a, **options))(params, inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(deep_norm=False, layer_norm_first=True, conv_pos=5, conv_bias=True),
        dict(gru_rel_pos=False, deep_norm=False, embed_dim=16),
        dict(relative_position_embedding=False, gru_rel_pos=False),
    ],
    ids=["third iteration", "pre-norm", "no gate", "no relative positions"],
)
def test_beats_gives_the_numbers_of_the_reference(changes):
    torch = pytest.importorskip("torch")
    from invideo_jax.interop import from_torch, infer_sound
    from invideo_jax.interop.given import Given
    from tests.models import torch_beats

    reference, config = torch_beats.made(**changes)
    state = {key: x.numpy() for key, x in reference.state_dict().items()}
    shapes = {key: x.shape for key, x in state.items()}
    model = models.make(infer_sound.beats(shapes, Given(config=config))).clone(mels=8, scan=True)
    params = from_torch.to_params(state, layout="beats", expected=models.abstract(model))
    audio, frames = sound(), np.array([F, 13, 4], np.int32)
    real = np.arange(14)[None] // 2 < -(-frames[:, None] // 4)
    masked = model.clone(mask_padding=True)
    both = jax.jit(
        lambda p: (
            model.apply({"params": p}, audio, frames),
            masked.apply({"params": p}, audio, frames),
        )
    )
    (tokens, pooled), (of_real, mean_of_real) = both(params)
    with torch.no_grad():
        want = reference(torch.from_numpy(audio)).numpy()
        want_real = reference(torch.from_numpy(audio), torch.from_numpy(~real)).numpy()
    assert tokens.shape == (B, 14, 16) and want.std() > 0.3
    np.testing.assert_allclose(tokens, want, atol=1e-5)
    np.testing.assert_allclose(pooled, want.mean(1), atol=1e-5)
    np.testing.assert_allclose(np.asarray(of_real)[real], want_real[real], atol=1e-5)
    for row, wanted, have in zip(mean_of_real, want_real, real):
        np.testing.assert_allclose(row, wanted[have].mean(0), atol=1e-5)
    assert np.abs(np.asarray(tokens)[1, 0] - np.asarray(of_real)[1, 0]).max() > 1e-2


def test_gated_positions_are_those_of_wavlm_where_queries_are_the_tokens():
    torch = pytest.importorskip("torch")
    wavlm = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
    torch.manual_seed(0)
    theirs = wavlm.WavLMAttention(16, 2, num_buckets=320, max_distance=800).eval()
    for x in theirs.parameters():
        x.data = torch.randn_like(x)
    # WavLM takes the gate from the tokens, BEATs from the queries: with this matrix both are the same.
    theirs.q_proj.weight.data, theirs.q_proj.bias.data = torch.eye(16), torch.zeros(16)
    for tokens, settings in [(900, (320, 800)), (900, (16, 20))]:
        theirs.num_buckets, theirs.max_distance = settings
        row = torch.arange(tokens)
        want = theirs._relative_positions_bucket(row[None] - row[:, None])
        found = beats.buckets_of(tokens, buckets=settings[0], max_distance=settings[1])
        np.testing.assert_array_equal(found, want)
    theirs.num_buckets, theirs.max_distance = 320, 800
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(x))[0]
    of = lambda name: {
        "kernel": getattr(theirs, name).weight.detach().numpy().T,
        "bias": getattr(theirs, name).bias.detach().numpy(),
    }
    names = dict(query="q_proj", key="k_proj", value="v_proj", out="out_proj")
    params = {ours: of(name) for ours, name in names.items()} | {"gate": of("gru_rel_pos_linear")}
    params["gate_scale"] = theirs.gru_rel_pos_const.detach().numpy().reshape(-1)
    rows = beats.buckets_of(9, buckets=320, max_distance=800)
    bias = np.moveaxis(theirs.rel_attn_embed.weight.detach().numpy()[rows], -1, 0)[None]
    unit = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    still = {"kernel": np.zeros((16, 8), np.float32), "bias": np.zeros(8, np.float32)}
    params |= {"norm1": unit, "norm2": unit, "up": still}
    params["down"] = {"kernel": np.zeros((8, 16), np.float32), "bias": np.zeros(16, np.float32)}
    block = beats.BeatsBlock(2, 8)
    found = jax.jit(lambda p: block.apply({"params": p}, x, bias=bias))(params)
    norm = lambda y: torch.nn.functional.layer_norm(y, (16,))
    want = norm(norm(torch.from_numpy(x) + want))
    np.testing.assert_allclose(found, want.numpy(), atol=1e-5)


def vit_in_numpy(p, audio, heads=2, patch=4):
    """Loops over examples, patches and heads."""
    norm = lambda x, n: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * n["scale"]
        + n["bias"]
    )
    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    out = []
    for one in audio:
        rows = []
        for t in range(len(one) // patch):
            for m in range(8 // patch):
                cut = one[t * patch : (t + 1) * patch, m * patch : (m + 1) * patch]
                angle = lambda place: [place * 10000 ** (-i / 4) for i in range(4)]
                code = [f(a) for place in (m, t) for f in (np.sin, np.cos) for a in angle(place)]
                rows.append(cut.reshape(-1) @ p["patch_embed"]["kernel"] + code)
        x = np.array(rows) + p["patch_embed"]["bias"]
        for i in range(2):
            b = jax.tree.map(lambda a, i=i: a[i], p["stack"]["blocks"])
            a, y = b["attention"], norm(x, b["norm1"])
            q, k, v = (y @ a[n]["kernel"] + a[n].get("bias", 0) for n in ("query", "key", "value"))
            mixed = []
            for h in np.split(np.arange(16), heads):
                scores = np.exp(q[:, h] @ k[:, h].T / math.sqrt(len(h)))
                mixed.append(scores / scores.sum(1, keepdims=True) @ v[:, h])
            x = x + np.concatenate(mixed, 1) @ a["out"]["kernel"] + a["out"]["bias"]
            up, down = b["mlp"]["up"], b["mlp"]["down"]
            hidden = gelu(norm(x, b["norm2"]) @ up["kernel"] + up["bias"])
            x = x + hidden @ down["kernel"] + down["bias"]
        out.append(norm(x, p["norm"]))
    return np.stack(out)


def test_audio_vit_is_the_transformer_written_with_loops():
    params = random_params(VIT)
    tokens, pooled = run(VIT, params, sound())
    want = vit_in_numpy(params, sound().astype(np.float64))
    np.testing.assert_allclose(tokens, want, atol=2e-5)
    np.testing.assert_allclose(pooled, want.mean(1), atol=2e-5)


@pytest.mark.parametrize(
    "model", [BEATS, VIT, VIT.clone(class_token=True)], ids=["beats", "mean", "class"]
)
def test_masked_padding_is_as_if_the_sound_ended_there(model):
    model = model.clone(mask_padding=True, depth=1)
    params = random_params(model)
    audio, frames = sound(), np.array([12, 10, 0], np.int32)
    noise = audio * (np.arange(F)[:, None] >= 12) * 5

    @jax.jit
    def both(p):
        alone = model.clone(mask_padding=False).apply({"params": p}, audio[:, :12])
        return model.apply({"params": p}, audio + noise, frames), alone

    (tokens, pooled), (alone, mean) = both(params)
    np.testing.assert_allclose(tokens[:2, :6], alone[:2], atol=1e-5)
    np.testing.assert_allclose(pooled[:2], mean[:2], atol=1e-5)
    np.testing.assert_array_equal(model.seen(frames, 14).sum(1), [6, 6, 0])
    assert np.isfinite(tokens).all()
    if not getattr(model, "class_token", False):
        np.testing.assert_array_equal(pooled[2], 0)


def test_padding_counts_as_published_unless_asked():
    params = random_params(BEATS)
    audio, frames = sound(), np.array([F, 8, 0], np.int32)
    both = lambda p: (BEATS.apply({"params": p}, audio), BEATS.apply({"params": p}, audio, frames))
    (first, mean), (tokens, pooled) = jax.jit(both)(params)
    np.testing.assert_array_equal(tokens, first)
    np.testing.assert_array_equal(pooled, mean)
    np.testing.assert_allclose(pooled, tokens.mean(1), atol=1e-6)
    np.testing.assert_array_equal(BEATS.seen(frames, 14).sum(1), [14, 14, 0])
    assert VIT.mask_padding and not Beats().mask_padding


def test_dropout_of_an_example_depends_on_its_own_key():
    shares = dict(dropout=0.2, attention_dropout=0.2, hidden_dropout=0.2, input_dropout=0.2)
    keys = jax.random.split(jax.random.key(0), B)
    order = np.array([2, 0, 1])
    model, params = BEATS.clone(**shares, depth=1), random_params(BEATS.clone(depth=1))
    apply = jax.jit(lambda p, a, k: model.apply({"params": p}, a, keys=k)[0])
    given, turned = apply(params, sound(), keys), apply(params, sound()[order], keys[order])
    np.testing.assert_allclose(given[order], turned, atol=1e-5)
    assert np.abs(apply(params, sound(), keys[order]) - given).max() > 0.05
    # Which numbers are drawn, of two blocks: before and after the positions, of each branch or within.
    for name, draws in zip(shares, (1 + 2 * 2, 2, 2, 1)):
        one, params = BEATS.clone(**{name: 0.2}, scan=False), random_params(BEATS)
        drop = lambda p, one=one: one.apply({"params": p}, sound(), keys=keys)[0]
        assert str(jax.make_jaxpr(drop)(params)).count("name=_bernoulli") == draws, name


@pytest.mark.slow  # four programs with gradients
def test_every_parameter_has_a_gradient_and_scan_changes_nothing():
    for model in (BEATS, VIT.clone(class_token=True, positions="learned", frames=F)):
        params = random_params(model)
        weigh = np.random.default_rng(3).normal(size=(B, 14, 16)).astype(np.float32)

        def value(p, model, weigh=weigh):
            tokens, pooled = model.apply({"params": p}, sound())
            # An example without sound has gradients that are numbers.
            ended = model.clone(mask_padding=True).apply({"params": p}, sound(), SOME)[1]
            return (tokens * weigh).sum() + jnp.square(pooled).sum() + ended.sum()

        results = [
            jax.jit(jax.value_and_grad(value), static_argnums=1)(params, m)
            for m in (model, model.clone(scan=False, remat="full"))
        ]
        (a, first), (b, second) = results
        np.testing.assert_allclose(a, b, rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), first, second)
        paths = jax.tree_util.tree_leaves_with_path(first)
        still = [str(path) for path, g in paths if np.abs(g).max() < 1e-4]
        assert all("'key'" in path and "'bias'" in path for path in still), still


def test_what_beats_starts_with():
    model = audio_encoder.build("beats", "Micro", width=256, heads=4, mlp_width=512)
    params = jax.jit(lambda: sharding.unbox(audio_encoder.init(model, jax.random.key(0))))()
    length = np.sqrt(np.square(params["position_kernel"]).sum((1, 2)))
    np.testing.assert_allclose(params["position_scale"], length, rtol=1e-5)
    np.testing.assert_allclose(np.std(params["position_kernel"]), (4 / (8 * 256)) ** 0.5, rtol=0.05)
    blocks, beta = params["stack"]["blocks"], (8 * 2) ** -0.25
    for name, gain, ends in [
        ("query", 1, 512), ("key", 1, 512), ("value", beta, 512), ("out", beta, 512),
        ("up", beta, 768), ("down", beta, 768),
    ]:  # fmt: skip
        np.testing.assert_allclose(
            np.std(blocks[name]["kernel"]), gain * (2 / ends) ** 0.5, rtol=0.05, err_msg=name
        )
        np.testing.assert_array_equal(blocks[name]["bias"], 0)
    np.testing.assert_array_equal(blocks["gate_scale"], 1)
    np.testing.assert_allclose(np.abs(params["patch_embed"]["kernel"]).max(), 1 / 16, rtol=0.01)


@pytest.mark.parametrize("kind, table", [("beats", sizes.BEATS), ("audio_vit", sizes.AUDIO_VIT)])
def test_every_size_has_its_number_of_parameters(kind, table):
    for size, row in table.items():
        model = audio_encoder.build(kind, size)
        model.check()
        if row.params:
            assert models.count(model) == row.params, size
    assert models.make(models.describe(model)) == model
    with pytest.raises(UserError, match='got size="?\'?Bb.*Did you mean "B"'):
        audio_encoder.build(kind, "Bb")
    with pytest.raises(UserError, match='kind=.beat.*Did you mean "beats"'):
        audio_encoder.build("beat", "B")


def test_mistakes_say_what_fits():
    for model, message in [
        (BEATS.clone(layer_norm_first=True), "DeepNorm is a form of post-norm"),
        (BEATS.clone(buckets=18), "buckets must be a multiple of 4"),
        (BEATS.clone(max_distance=4), "max_distance more than a quarter"),
        (BEATS.clone(conv_groups=5), "width must be a multiple of conv_groups"),
        (BEATS.clone(mels=6), "mels must be a multiple of patch; got mels=6, patch=4"),
        (VIT.clone(positions="sin"), 'Did you mean "sincos"'),
        (VIT.clone(activation="glu"), "activation must be known"),
    ]:
        with pytest.raises(UserError, match=message):
            model.check()
    init = lambda model, audio: jax.eval_shape(model.init, jax.random.key(0), audio)
    with pytest.raises(
        UserError, match=r"\[B, F, mels\] = \[B, 4 or more, 8\]; got shape=\[3, 30, 7"
    ):
        init(BEATS, sound()[..., :7])
    with pytest.raises(UserError, match="got shape=.3, 3, 8"):
        init(VIT, sound(frames=3))
    with pytest.raises(UserError, match="sounds of one length; got 30 frames, frames=998"):
        init(VIT.clone(positions="learned"), sound())


def test_learned_positions_start_as_the_fixed_ones():
    learned = VIT.clone(positions="learned", frames=F, depth=1)
    params = jax.jit(lambda: sharding.unbox(audio_encoder.init(learned, jax.random.key(0))))()
    want = VIT.apply({"params": params}, F, method="_places")
    np.testing.assert_allclose(params["position_embedding"], want, atol=1e-6)
    assert np.std(want) > 0.5


@pytest.mark.slow  # compiles for 8 devices
def test_devices_that_share_a_model_give_the_numbers_of_one():
    weigh = np.random.default_rng(3).normal(size=(4, 14, 16)).astype(np.float32)
    audio = np.random.default_rng(4).normal(size=(4, F, 8)).astype(np.float32)
    frames = np.array([F, 9, 0, 20], np.int32)
    model = BEATS.clone(mask_padding=True)
    value = lambda p, a, n: (model.apply({"params": p}, a, n)[0] * weigh).sum()
    params = random_params(model)
    want = jax.jit(jax.value_and_grad(value))(params, audio, frames)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(lambda: audio_encoder.init(model, jax.random.key(0)))
    placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
    rows = jax.device_put((audio, frames), sharding.batch_sharding(mesh))
    with sharding.use(mesh):
        found = jax.jit(jax.value_and_grad(value))(placed, *rows)
    kernel = placed["stack"]["blocks"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 8)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4)
    jax.tree.map(close, jax.device_get(found), jax.device_get(want))


@pytest.mark.slow  # 90 M parameters
def test_the_published_size_gives_the_numbers_of_the_reference():
    torch = pytest.importorskip("torch")
    from invideo_jax.interop import from_torch
    from tests.models import torch_beats

    row = dataclasses.asdict(sizes.BEATS["B"])
    reference, config = torch_beats.made(
        input_patch_size=16, embed_dim=row["embed"], encoder_layers=row["depth"],
        encoder_embed_dim=row["width"], encoder_ffn_embed_dim=row["mlp_width"],
        encoder_attention_heads=row["heads"], conv_pos=128, conv_pos_groups=16, num_buckets=320,
        max_distance=800,
    )  # fmt: skip
    for name, x in reference.named_parameters():
        if x.ndim == 2 and "relative" not in name and "grep" not in name:
            x.data = x.data / 0.3 / x.shape[1] ** 0.5
    model = audio_encoder.build("beats", "B", scan=True)
    state = {key: x.numpy() for key, x in reference.state_dict().items()}
    assert sum(x.numel() for x in reference.parameters()) == row["params"]
    params = from_torch.to_params(state, layout="beats", expected=models.abstract(model))
    audio = np.random.default_rng(0).normal(size=(1, 998, 64)).astype(np.float32)
    tokens, _ = run(model, params, audio)
    with torch.no_grad():
        want = reference(torch.from_numpy(audio)).numpy()
    assert tokens.shape == (1, 248, 768)
    np.testing.assert_allclose(tokens, want, atol=1e-5 * np.abs(want).max())
