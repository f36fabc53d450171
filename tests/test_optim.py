"""Schedules against published values, AdamW and Muon against plain NumPy, rules by path."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import optim, sharding
from invideo_jax.errors import UserError
from invideo_jax.models import video_mae

# Values of the published cosine scheduler: 10 epochs of 4 steps, 2 of warm-up, 1.5e-4 to 1e-5; and
# 4 epochs of 5 steps, 2 of warm-up from 0.1, 1.0 to 0.
WARM2OF10 = {0: 0.0, 1: 2.1428571428571428e-05, 7: 0.00015, 8: 0.00015, 9: 0.00014966293086705377,
             24: 7.999999999999999e-05, 39: 1.0337069132946224e-05}  # fmt: skip
START = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 0.9755282581475768,
         0.9045084971874737, 0.7938926261462366, 0.6545084971874737, 0.5, 0.34549150281252633,
         0.2061073738537635, 0.09549150281252633, 0.024471741852423234]  # fmt: skip


def box(value, *names):
    return nn.LogicallyPartitioned(value, names)


def tree(depth=3, width=8):
    """Parameters named as a scanned video encoder's, random, boxed."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "cls_token": box(draw(1, 1, width), None, None, "norm"),
        "pos_embed": box(draw(5, width), None, "norm"),
        "patch_embed": {"kernel": box(draw(12, width), "patch", "embed"),
                        "bias": box(draw(width), "norm")},
        "encoder": {"blocks": {
            "attention": {"query": {"kernel": box(draw(depth, width, width), "layers", "embed", "heads"),
                                    "bias": box(draw(depth, width), "layers", "heads")}},
            "mlp": {"up": {"kernel": box(draw(depth, width, 2 * width), "layers", "embed", "mlp")}},
            "norm1": {"scale": box(draw(depth, width), "layers", "norm")},
            "scale1": box(draw(depth, width), "layers", "norm"),
        }},
        "norm": {"scale": box(draw(width), "norm")},
        "head": {"kernel": box(draw(width, 4), "embed", None), "bias": box(draw(4), None)},
    }  # fmt: skip


def flat(params):
    return {
        sharding.path_of(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)
    }


def run(tx, params, gradients):
    """Parameters after one update per gradient tree."""
    update = jax.jit(tx.update)
    opt_state = tx.init(params)
    for grads in gradients:
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def gradients_like(params, count, seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    return [jax.tree.map(draw, params) for _ in range(count)]


# --------------------------------------------------------------------------------------- schedules


def test_cosine_gives_the_published_values():
    warm = optim.make_schedule("cosine", peak=1.5e-4, end=1e-5, steps=40, warmup_steps=8)
    for step, value in WARM2OF10.items():
        assert float(warm(step)) == pytest.approx(value, rel=2e-6, abs=1e-11), step
    start = optim.make_schedule(
        "cosine", peak=1.0, end=0.0, steps=20, warmup_steps=10, warmup_start=0.1
    )
    got = [float(start(step)) for step in range(20)]
    np.testing.assert_allclose(got, START, rtol=2e-6, atol=1e-7)


def test_cosine_against_the_golden_file(shared):
    cases = json.loads((shared / "golden/b_cosine_scheduler.json").read_text())
    assert len(cases) == 4
    for name, case in cases.items():
        args = case["args"]
        per_epoch = args["niter_per_ep"]
        warmup = args.get("warmup_steps") or int(args.get("warmup_epochs", 0) * per_epoch)
        schedule = optim.make_schedule(
            "cosine",
            peak=args["base_value"],
            end=args["final_value"],
            steps=args["epochs"] * per_epoch,
            warmup_steps=warmup,
            warmup_start=args.get("start_warmup_value", 0.0),
        )
        got = np.asarray(jax.vmap(schedule)(jnp.arange(len(case["values"]))))
        np.testing.assert_allclose(got, case["values"], rtol=3e-6, atol=1e-7, err_msg=name)


def test_batch_scaling():
    assert optim.batch_scaled(1.5e-4, 4096) == pytest.approx(2.4e-3)  # InternVideo2-1B, stage 1
    assert optim.batch_scaled(1e-3, 1536, 1024) == pytest.approx(1.5e-3)
    assert optim.batch_scaled(1e-3, 1536, 0) == 1e-3


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_wsd_is_flat_and_then_falls(shape):
    schedule = optim.make_schedule(
        "wsd", peak=1.0, end=0.2, steps=30, warmup_steps=5, decay_steps=10, decay_shape=shape
    )
    got = np.asarray(jax.vmap(schedule)(jnp.arange(30)))
    want = []
    for step in range(30):
        if step < 5:
            want.append(step / 4)
        elif step < 20:
            want.append(1.0)
        else:
            done = (step - 20) / 10
            want.append(1.0 - 0.8 * (math.sqrt(done) if shape == "sqrt" else done))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_constant_and_what_follows_the_end():
    constant = optim.make_schedule("constant", peak=0.5, steps=10, warmup_steps=3)
    got = [float(constant(i)) for i in range(5)]
    np.testing.assert_allclose(got, [0, 0.25, 0.5, 0.5, 0.5])
    cosine = optim.make_schedule("cosine", peak=0.5, steps=10)
    assert float(cosine(10)) == float(cosine(1000)) == float(cosine(9))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(name="cosin"), 'Unknown schedule "cosin". Did you mean "cosine"'),
        (dict(warmup_steps=11), "steps=10, warmup_steps=11"),
        (dict(name="wsd", decay_steps=9, warmup_steps=2), "decay_steps=9"),
        (dict(decay_steps=3), 'belongs to schedule "wsd"'),
        (dict(name="wsd", decay_shape="cubic"), 'decay_shape="cubic"'),
    ],
)
def test_wrong_schedules(wrong, said):
    with pytest.raises(UserError, match=said):
        optim.make_schedule(**(dict(name="cosine", peak=1.0, steps=10) | wrong))


# ------------------------------------------------------------------------------ parameters by path


def test_no_decay_is_judged_per_layer():
    table = optim.plan("adamw", tree(), weight_decay=0.05)
    decayed = {leaf.path for leaf in table if leaf.weight_decay}
    assert decayed == {
        "patch_embed/kernel",
        "encoder/blocks/attention/query/kernel",
        "encoder/blocks/mlp/up/kernel",
        "head/kernel",
    }


def test_more_patterns_can_be_spared_from_decay():
    table = optim.plan("adamw", tree(), weight_decay=0.05, no_decay=("^head/", "patch_embed"))
    assert {x.path for x in table if x.weight_decay} == {
        "encoder/blocks/attention/query/kernel",
        "encoder/blocks/mlp/up/kernel",
    }


def _published_path(key):
    """Where a parameter of the published model lies in this package's tree, and its layer."""
    parts = key.split(".")
    if parts[0] == "blocks":
        return "encoder/blocks/" + "/".join(parts[2:]), int(parts[1])
    return "/".join(parts), None


@pytest.mark.parametrize("name", ["plain", "ap"])
def test_decay_and_layer_rates_equal_the_published_ones(shared, name):
    file = shared / f"golden/b_internvideo2_finetune_tiny_{name}.json"
    meta = json.loads(file.read_text())
    want = meta["param_weight_decay_and_lr_scale_at_layer_decay_0_75"]
    depth, flat_tree = meta["config"]["depth"], {}
    for key in want:
        path, layer = _published_path(key)
        shape = tuple(meta["tensors"][f"state/{key}"][1])
        names = (None,) * len(shape)
        if layer is not None:
            shape, names = (depth, *shape), ("layers", *names)
        flat_tree[path] = box(jax.ShapeDtypeStruct(shape, jnp.float32), *names)
    table = optim.plan("adamw", flat_tree, weight_decay=0.05, layer_decay=0.75)
    got = {leaf.path: leaf for leaf in table}
    for key, (decay, rate) in want.items():
        path, layer = _published_path(key)
        leaf = got[path]
        mine = leaf.rate if layer is None else leaf.rate[layer]
        assert (leaf.weight_decay, mine) == pytest.approx((decay, rate)), key


def test_layer_rates_without_shared_files():
    rates = {x.path: x.rate for x in optim.plan("adamw", tree(), layer_decay=0.5)}
    assert rates["encoder/blocks/norm1/scale"] == (0.125, 0.25, 0.5)
    for path in ("cls_token", "pos_embed", "patch_embed/kernel", "patch_embed/bias"):
        assert rates[path] == 0.0625
    assert rates["head/kernel"] == rates["norm/scale"] == 1.0


def test_a_decoder_has_the_full_rate():
    both = {"encoder": tree()["encoder"], "decoder": tree(depth=2)["encoder"]}
    rates = {x.path: x.rate for x in optim.plan("adamw", both, layer_decay=0.5)}
    assert rates["encoder/blocks/scale1"] == (0.125, 0.25, 0.5)
    assert rates["decoder/blocks/scale1"] == 1.0


def test_layer_rates_of_numbered_blocks():
    params = {f"blocks_{i}": {"kernel": jnp.ones((2, 2))} for i in range(3)}
    rates = {x.path: x.rate for x in optim.plan("adamw", params, layer_decay=0.5)}
    assert [rates[f"blocks_{i}/kernel"] for i in range(3)] == [0.125, 0.25, 0.5]


def test_layer_decay_needs_one_stack():
    two = {"encoder": tree()["encoder"], "text_encoder": tree()["encoder"]}
    with pytest.raises(UserError, match=r"one stack.*depths \[3\] in \['encoder', 'text_enc"):
        optim.plan("adamw", two, layer_decay=0.5)
    given = dict(decay=0.5, blocks="^encoder/blocks")
    rates = {x.path: x.rate for x in optim.plan("adamw", two, layer_decay=given)}
    assert rates["encoder/blocks/scale1"] == (0.125, 0.25, 0.5)
    assert rates["text_encoder/blocks/scale1"] == 1.0
    with pytest.raises(UserError, match="matches none of 2.*Nearest paths: head"):
        optim.plan("adamw", {"head": tree()["head"]}, layer_decay=0.5)


def test_first_matching_multiplier_wins_and_multiplies_the_layer_rate():
    pairs = [("query", 10.0), ("encoder", 2.0)]
    table = optim.plan("adamw", tree(), lr_multipliers=pairs, layer_decay=0.5)
    rates = {x.path: x.rate for x in table}
    assert rates["encoder/blocks/attention/query/bias"] == (1.25, 2.5, 5.0)
    assert rates["encoder/blocks/scale1"] == (0.25, 0.5, 1.0)
    assert rates["head/bias"] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        dict(freeze=("patch_embedding/kernel",)),
        dict(no_decay=("patch_embedding/kernel",)),
        dict(lr_multipliers=[("patch_embedding/kernel", 2.0)]),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest_path(wrong):
    (setting,) = wrong
    said = f"{setting}='patch_embedding/kernel'.*Nearest paths: patch_embed/kernel"
    with pytest.raises(UserError, match=said):
        optim.plan("adamw", tree(), **wrong)


def test_other_mistakes():
    schedule = optax.constant_schedule(1.0)
    with pytest.raises(UserError, match='Unknown optimizer "adam". Did you mean "adamw"'):
        optim.make_optimizer("adam", schedule=schedule, params=tree())
    with pytest.raises(UserError, match="matches everything"):
        optim.make_optimizer("adamw", schedule=schedule, params=tree(), freeze=(".",))
    with pytest.raises(UserError, match="regular expressions; got '\\('"):
        optim.plan("adamw", tree(), freeze=("(",))
    with pytest.raises(UserError, match=r"in \(0, 1\]; got layer_decay=1.5"):
        optim.plan("adamw", tree(), layer_decay=1.5)
    with pytest.raises(UserError, match='belong to optimizer "muon"'):
        optim.make_optimizer("adamw", schedule=schedule, params=tree(), muon=("kernel",))


def test_trainable_mask():
    mask = optim.trainable_mask(tree(), ("^encoder/", "token"))
    got = {sharding.path_of(p) for p, keep in jax.tree_util.tree_leaves_with_path(mask) if not keep}
    assert got == {p for p in flat(sharding.unbox(tree())) if "encoder" in p or "token" in p}
    assert all(jax.tree.leaves(optim.trainable_mask(tree())))


def test_rules_of_the_real_video_mae():
    model = video_mae.build("Micro")
    boxed = jax.eval_shape(lambda: video_mae.init(model, jax.random.key(0)))
    table = optim.plan("muon", boxed, weight_decay=0.05)
    kernels = {x.path for x in table if x.path.endswith("/kernel")}
    assert len(kernels) == 2 * 6 + 3  # six in a block, patches, encoder to decoder, head
    assert {x.path for x in table if x.weight_decay} == kernels
    assert {x.path for x in table if x.rule == "muon"} == {k for k in kernels if "/blocks/" in k}
    rates = {x.path: x.rate for x in optim.plan("adamw", boxed, layer_decay=0.5)}
    assert rates["encoder/stack/blocks/norm1/scale"] == (0.25, 0.5)
    assert rates["encoder/patch_embed/kernel"] == rates["mask_token"] == 0.125
    assert rates["decoder/blocks/norm1/scale"] == rates["encoder/norm/scale"] == 1.0


# -------------------------------------------------------------------------------------- optimisers


def naive_adamw(params, gradients, table, schedule, betas, eps):
    """AdamW with decoupled decay, one array and one step at a time, in float64."""
    b1, b2 = betas
    out = {}
    for leaf in table:
        p = params[leaf.path].astype(np.float64)
        m, v = np.zeros_like(p), np.zeros_like(p)
        rate = (
            np.asarray(leaf.rate).reshape(-1, *[1] * (p.ndim - 1))
            if leaf.stacked == 0
            else leaf.rate
        )
        for n, grads in enumerate(gradients):
            g = grads[leaf.path].astype(np.float64)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            lr = float(schedule(n)) * rate
            p = p - lr * leaf.weight_decay * p
            p = p - lr * (m / (1 - b1 ** (n + 1))) / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
        out[leaf.path] = p
    return out


def test_adamw_equals_plain_numpy():
    boxed = tree()
    params = sharding.unbox(boxed)
    schedule = optim.make_schedule("cosine", peak=0.03, end=0.01, steps=6, warmup_steps=2)
    tx, table = optim.make_optimizer(
        "adamw", schedule=schedule, params=boxed, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6,
        layer_decay=0.75, lr_multipliers=[("head", 3.0)],
    )  # fmt: skip
    grads = gradients_like(params, 4)
    got, _ = run(tx, params, grads)
    want = naive_adamw(flat(params), [flat(g) for g in grads], table, schedule, (0.9, 0.98), 1e-6)
    for path, value in flat(got).items():
        np.testing.assert_allclose(value, want[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_adamw_equals_pytorch():
    torch = pytest.importorskip("torch")
    boxed = tree()
    params = sharding.unbox(boxed)
    tx, table = optim.make_optimizer(
        "adamw", schedule=optax.constant_schedule(0.01), params=boxed, weight_decay=0.05,
        betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    grads = gradients_like(params, 3)
    got = flat(run(tx, params, grads)[0])
    tensors = {k: torch.nn.Parameter(torch.tensor(v.copy())) for k, v in flat(params).items()}
    groups = [dict(params=[tensors[x.path]], weight_decay=x.weight_decay) for x in table]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    for g in grads:
        for path, value in flat(g).items():
            tensors[path].grad = torch.tensor(value.copy())
        reference.step()
    for path, value in got.items():
        np.testing.assert_allclose(value, tensors[path].detach().numpy(), rtol=1e-5, atol=1e-6)


def naive_muon(g, momentum=0.95, steps=5):
    """First Muon direction of one matrix: Nesterov momentum, then quintic Newton-Schulz."""
    # After one step the bias-corrected average is g, looking one step ahead m / (1 - b^2).
    ahead = momentum * ((1 - momentum) * g) / (1 - momentum**2)
    x = ahead + (1 - momentum) * g
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if turned else x
    return 0.2 * math.sqrt(max(g.shape)) * x


def test_muon_orthogonalises_each_layer_of_a_stack():
    boxed = tree()
    params = sharding.unbox(boxed)
    tx, table = optim.make_optimizer(
        "muon", schedule=optax.constant_schedule(0.1), params=boxed, weight_decay=0.5
    )
    rules = {x.path: x.rule for x in table}
    muon = {p for p, rule in rules.items() if rule == "muon"}
    assert muon == {"encoder/blocks/attention/query/kernel", "encoder/blocks/mlp/up/kernel"}
    (grads,) = gradients_like(params, 1)
    got = flat(run(tx, params, [grads])[0])
    for path in muon:
        before, g = flat(params)[path], flat(grads)[path]
        for layer in range(3):
            direction = naive_muon(g[layer].astype(np.float64))
            want = before[layer] - 0.1 * (direction + 0.5 * before[layer])
            np.testing.assert_allclose(got[path][layer], want, rtol=1e-4, atol=1e-5)
    # The rest is AdamW, whose first step is the sign of the gradient.
    moved = got["norm/scale"] - flat(params)["norm/scale"]
    np.testing.assert_allclose(moved, -0.1 * np.sign(flat(grads)["norm/scale"]), rtol=1e-4)


def test_muon_takes_the_kernels_it_is_told():
    table = optim.plan("muon", tree(), muon=("^head/",))
    assert {x.path for x in table if x.rule == "muon"} == {"head/kernel"}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_stay_bit_for_bit_and_have_no_state(name):
    boxed = tree()
    params = sharding.unbox(boxed)
    tx, table = optim.make_optimizer(
        name, schedule=optax.constant_schedule(0.1), params=boxed, weight_decay=0.1,
        freeze=("^encoder/blocks/attention", "^head"),
    )  # fmt: skip
    got, opt_state = run(tx, params, gradients_like(params, 2))
    frozen = {x.path for x in table if x.rule == "frozen"}
    assert len(frozen) == 4
    for path, value in flat(params).items():
        same = np.array_equal(flat(got)[path], value)
        assert same == (path in frozen), path
    assert not [p for p in flat(opt_state) if any(p.endswith(f) for f in frozen)]


def test_lion_and_sgd_directions():
    params = {"a": jnp.array([1.0, 2.0])}
    grads = [{"a": jnp.array([3.0, -0.5])}, {"a": jnp.array([-1.0, -0.5])}]
    schedule = optax.constant_schedule(0.1)
    tx, _ = optim.make_optimizer("sgd", schedule=schedule, params=params, momentum=0.5)
    got, _ = run(tx, params, grads)
    np.testing.assert_allclose(got["a"], [1 - 0.3 - 0.1 * 0.5, 2 + 0.05 + 0.1 * 0.75], rtol=1e-6)
    tx, _ = optim.make_optimizer("lion", schedule=schedule, params=params, betas=(0.9, 0.99))
    got, _ = run(tx, params, grads)
    # Second step: sign(0.9 * 0.03 - 0.1) = -1 in the first place.
    np.testing.assert_allclose(got["a"], [1 - 0.1 + 0.1, 2 + 0.1 + 0.1], rtol=1e-6)


def test_bfloat16_gradients_are_widened_before_they_are_squared():
    params = {"a": jnp.ones((4, 4))}
    tx, _ = optim.make_optimizer("adamw", schedule=optax.constant_schedule(0.1), params=params)
    grads = {"a": jnp.full((4, 4), 0.3, jnp.bfloat16)}
    updates, opt_state = tx.update(grads, tx.init(params), params)
    assert updates["a"].dtype == jnp.float32
    moments = {path[-4:]: x for path, x in flat(opt_state).items() if path.endswith("/a")}
    value = float(grads["a"][0, 0])
    np.testing.assert_allclose(moments["mu/a"], 0.1 * value, rtol=1e-6)
    np.testing.assert_allclose(moments["nu/a"], 0.001 * value**2, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_on_a_mesh_equal_one_device(name):
    boxed = tree()
    tx, _ = optim.make_optimizer(
        name,
        schedule=optax.constant_schedule(0.1),
        params=boxed,
        weight_decay=0.1,
        layer_decay=0.75,
    )
    params = sharding.unbox(boxed)
    grads = gradients_like(params, 2)
    want, _ = run(tx, params, grads)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    where = sharding.param_shardings(boxed, mesh)
    with sharding.use(mesh):
        put = lambda x: jax.device_put(x, where)
        got, opt_state = run(tx, put(params), [put(g) for g in grads])
    kernel = got["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 2, 8)
    for path, value in flat(want).items():
        np.testing.assert_allclose(flat(got)[path], value, rtol=1e-4, atol=1e-5, err_msg=path)
