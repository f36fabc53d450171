"""Model FLOPs: formula, jaxpr walk and XLA's own count agree; peaks are found by device name."""

import types

import jax
import jax.numpy as jnp
import pytest

from invideo_jax import sharding
from invideo_jax.models import video_mae
from invideo_jax.scale import flops
from invideo_jax.steps import masked

SIZES = dict(
    width=48, depth=3, heads=4, mlp_width=160, decoder_width=24, decoder_depth=2,
    decoder_heads=3, decoder_mlp_width=96, patch=8, tubelet=2, frames=4, image_size=32,
)  # fmt: skip
VISIBLE, TOKENS, PIXELS = 8, 32, 2 * 8 * 8 * 3  # 12 of 16 places hidden at each of 2 times


def naive_flops():
    """Multiply-adds of every matrix product of the model, counted one token at a time."""
    parts = {}
    product = lambda rows, inner, columns: sum(2 * inner * columns for _ in range(rows))

    def stack(tokens, width, mlp, heads, depth):
        head = width // heads
        one = 4 * product(tokens, width, width)
        one += sum(
            product(tokens, head, tokens) + product(tokens, tokens, head) for _ in range(heads)
        )
        return depth * (one + product(tokens, width, mlp) + product(tokens, mlp, width))

    parts["patch_embed"] = product(VISIBLE, PIXELS, 48)
    parts["encoder"] = stack(VISIBLE, 48, 160, 4, 3)
    parts["encoder_to_decoder"] = product(VISIBLE, 48, 24)
    parts["decoder"] = stack(TOKENS, 24, 96, 3, 2)
    parts["head"] = product(TOKENS - VISIBLE, 24, PIXELS)
    return parts


def formula():
    return flops.video_mae_flops(
        tokens=TOKENS, visible=VISIBLE, pixels=PIXELS, width=48, depth=3, mlp=160,
        decoder_width=24, decoder_depth=2, decoder_mlp=96,
    )  # fmt: skip


def loss_and_arguments(clips, **options):
    model = video_mae.make(**SIZES, **options)
    params = jax.eval_shape(lambda: sharding.unbox(video_mae.init(model, jax.random.key(0))))
    batch = {
        "video": jax.ShapeDtypeStruct((clips, 4, 32, 32, 3), jnp.uint8),
        "position": jax.ShapeDtypeStruct((clips,), jnp.uint32),
        "valid": jax.ShapeDtypeStruct((clips,), jnp.bool_),
    }
    loss = masked.make_loss(
        model=model, stage_key=jax.random.key(0), mask=dict(name="tube", ratio=0.75)
    )
    return lambda p, b: loss(p, b)[0].total, params, batch


def test_formula_equals_counting_by_hand():
    assert formula() == naive_flops()


def test_formula_of_the_published_base_model():
    got = flops.video_mae_flops(
        tokens=1568, visible=160, pixels=1536, width=768, depth=12, mlp=3072,
        decoder_width=384, decoder_depth=4, decoder_mlp=1536,
    )  # fmt: skip
    # 12 blocks of 12 D^2 multiply-adds a token, plus 2 V^2 D: 28.1 GFLOP.
    assert got["encoder"] == 2 * 12 * (12 * 160 * 768**2 + 2 * 160**2 * 768)
    assert sum(got.values()) == pytest.approx(67.5e9, rel=0.01)


@pytest.mark.parametrize("scan", [False, True])
def test_the_traced_step_has_the_flops_of_the_formula(scan):
    loss, params, batch = loss_and_arguments(4, scan=scan)
    forward = flops.jaxpr_flops(loss, params, batch)
    assert forward == 4 * sum(formula().values())
    training = flops.jaxpr_flops(jax.grad(loss), params, batch)
    assert training == pytest.approx(4 * flops.training_flops(formula()), rel=0.01)


def test_rematerialisation_costs_one_more_forward_of_the_blocks():
    loss, params, batch = loss_and_arguments(2, scan=True, remat="full")
    training = flops.jaxpr_flops(jax.grad(loss), params, batch)
    parts = formula()
    again = parts["encoder"] + parts["decoder"]
    extra = training - 2 * flops.training_flops(parts)
    # The last product of a block is not needed by its backward pass.
    last = 2 * (VISIBLE * 160 * 48 * 3 + TOKENS * 96 * 24 * 2)
    assert 2 * (again - last) <= extra <= 2 * again


def test_the_compiler_counts_the_same_for_an_unrolled_model():
    loss, params, batch = loss_and_arguments(2, scan=False)
    counted = jax.jit(loss).lower(params, batch).compile().cost_analysis()["flops"]
    # The compiler also counts softmax, norms, activations and the mask.
    walked = flops.jaxpr_flops(loss, params, batch)
    assert walked < counted < 1.35 * walked


def test_walk_of_each_kind_of_program():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    one = 2 * 3 * 4 * 5 * 6
    product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
    assert flops.jaxpr_flops(product, a, b) == one
    assert flops.jaxpr_flops(jax.jit(product), a, b) == one
    assert flops.jaxpr_flops(jax.checkpoint(product), a, b) == one
    scan = lambda a, b: jax.lax.scan(lambda c, _: (c, product(a, b)), 0.0, None, length=7)
    assert flops.jaxpr_flops(scan, a, b) == 7 * one
    cond = lambda p, a, b: jax.lax.cond(p, product, lambda a, b: 2 * product(a, 3 * b), a, b)
    assert flops.jaxpr_flops(cond, True, a, b) == one
    custom = jax.custom_vjp(product)
    custom.defvjp(lambda a, b: (product(a, b), (a, b)), lambda r, g: r)
    assert flops.jaxpr_flops(custom, a, b) == one
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.jaxpr_flops(conv, image, kernel) == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


def test_walk_multiplies_shards_and_refuses_unknown_round_counts():
    mesh = sharding.make_mesh(data=8)
    x = jnp.ones((16, 4))
    spec = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops.jaxpr_flops(split, x) == 8 * (2 * 2 * 2 * 4)
    loop = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)
    with pytest.raises(ValueError, match="inside a while"):
        flops.jaxpr_flops(loop, jnp.ones((3, 3)))
    counting = lambda n: jax.lax.while_loop(lambda c: c < n, lambda c: c + 1, 0)
    assert flops.jaxpr_flops(counting, 5) == 0


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(kind, peak):
    assert flops.device_peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_a_cpu_has_no_peak():
    assert flops.device_peak_flops() is None
