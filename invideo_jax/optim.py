"""Schedules and optimisers; rates, decay and freezing are chosen by parameter path.

A path is 'a/b/c'; a pattern is a regular expression searched in it; the first pattern that matches
wins; a pattern that matches nothing is an error. Kernels of scanned blocks are stacked ([E, in, out]):
whatever is said per layer (1-D means no decay, layer-wise rates, orthogonalisation) is applied per
slice of the stack.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]
REFERENCE_BATCH = 256
OPTIMIZERS = ("adamw", "muon", "lion", "sgd")

# Never decayed besides 1-D parameters. Source: VideoMAE and InternVideo2, `no_weight_decay`.
NO_DECAY = (
    r"(^|/)(cls_token|mask_token)$",
    r"(^|[/_])position_(embedding|spatial|temporal|cls)$",
    r"pos_embed",
)
# Layer 0 of layer-wise decay. Source: InternVideo2 `get_num_layer_for_vit`, where position tables
# of other names than `pos_embed` fall through to the last layer's rate; here they are layer 0 too.
EMBEDDING = (
    r"(^|/)(cls_token|mask_token|patch_embed|[^/]*pos_embed[^/]*"
    r"|([a-z]+_)*position_(embedding|spatial|temporal|cls))(/|$)"
)
BLOCKS = r"(^|/)blocks?([_/]\d+)?(/|$)"
# The blocks that layer-wise decay counts; a decoder has the full rate, as a head has.
ENCODER_BLOCKS = r"^(.*encoder/)?(stack/)?blocks?([_/]\d+)?(/|$)"


# --------------------------------------------------------------------------------------- schedules


def batch_scaled(rate: float, batch_size: int, reference: int = REFERENCE_BATCH) -> float:
    """The learning rate of the papers, rate * batch_size / reference; `reference` 0 leaves it as it is."""
    return rate * batch_size / reference if reference else rate


def make_schedule(
    name: str,
    *,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    end: float = 0.0,
    decay_steps: int | None = None,
    decay_shape: str = "linear",
) -> Schedule:
    """Learning rate as a function of the step (0 is the first update).

    Args:
        name: 'cosine' (warm-up, then half a cosine to `end`), 'wsd' (warm-up, stable, decay) or
            'constant' (warm-up, then `peak`).
        peak, warmup_start, end: rates.
        steps: length of the whole schedule; later steps keep the last value.
        warmup_steps: linear from `warmup_start` at step 0 to `peak` at step warmup_steps - 1.
        decay_steps: of 'wsd': length of the decay at the end; default a fifth of `steps`.
        decay_shape: of 'wsd': 'linear' or 'sqrt' (peak * (1 - sqrt(share done))).

    Raises:
        UserError: unknown name, or parts longer than the whole.

    Source: cosine: InternVideo2 and VideoMAE `cosine_scheduler`; WSD: Hagele et al. 2024, section 4.
    """
    names = ("cosine", "wsd", "constant")
    if name not in names:
        raise UserError(f'Unknown schedule "{name}".{nearest(name, names)}')
    if decay_shape not in ("linear", "sqrt"):
        raise UserError(f'decay_shape must be "linear" or "sqrt"; got decay_shape="{decay_shape}".')
    if name != "wsd" and decay_steps is not None:
        raise UserError(f'decay_steps belongs to schedule "wsd"; got it with name="{name}".')
    if name == "wsd" and decay_steps is None:
        decay_steps = steps // 5
    after = steps - warmup_steps  # steps that remain after the warm-up
    if steps < 1 or warmup_steps < 0 or after < (decay_steps or 0):
        raise UserError(
            "Warm-up and decay must fit into the schedule; got "
            f"steps={steps}, warmup_steps={warmup_steps}, decay_steps={decay_steps}. "
            "Train longer or shorten them."
        )

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step).astype(jnp.float32)
        rise = warmup_start + (peak - warmup_start) * step / max(warmup_steps - 1, 1)
        i = jnp.clip(step - warmup_steps, 0, max(after - 1, 0))
        if name == "cosine":
            main = end + 0.5 * (peak - end) * (1 + jnp.cos(math.pi * i / max(after, 1)))
        elif name == "wsd":
            done = jnp.clip((i - (after - decay_steps)) / max(decay_steps, 1), 0, 1)
            done = jnp.sqrt(done) if decay_shape == "sqrt" else done
            main = peak + (end - peak) * done
        else:
            main = jnp.full_like(step, peak)
        return jnp.where(step < warmup_steps, rise, main).astype(jnp.float32)

    return schedule


# ------------------------------------------------------------------------------ parameters by path


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What the optimiser does with one parameter.

    Attributes:
        path, shape: as in the parameter tree.
        stacked: position of the 'layers' dimension, or None.
        rule: 'adamw', 'muon', 'lion', 'sgd' or 'frozen'.
        weight_decay: coefficient, 0 where nothing decays.
        rate: multiplier of the learning rate; a tuple of one number per layer where they differ.
    """

    path: str
    shape: tuple[int, ...]
    stacked: int | None = None
    rule: str = "adamw"
    weight_decay: float = 0.0
    rate: float | tuple[float, ...] = 1.0

    @property
    def ndim(self) -> int:
        """Dimensions of one layer's slice."""
        return len(self.shape) - (self.stacked is not None)


def leaves(params: PyTree) -> list[Leaf]:
    """Every parameter of a tree; boxes with axis names say which are stacked over layers."""
    found = []
    boxed = jax.tree_util.tree_leaves_with_path(params, is_leaf=sharding.is_box)
    for key_path, leaf in boxed:
        names = tuple(leaf.names) if sharding.is_box(leaf) else ()
        value = leaf.value if sharding.is_box(leaf) else leaf
        stacked = names.index("layers") if "layers" in names else None
        found.append(Leaf(sharding.path_of(key_path), tuple(value.shape), stacked))
    return found


def matching(
    patterns: str | Sequence[str], paths: Sequence[str], *, what: str, none_ok: bool = False
) -> list[set[str]]:
    """For each pattern the paths it is found in.

    Args:
        patterns: regular expressions.
        what: name of the setting, for the error message.
        none_ok: whether a pattern may match nothing.

    Raises:
        UserError: a pattern that matches nothing, or is no regular expression.
    """
    found = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            hits = {p for p in paths if re.search(pattern, p)}
        except re.error as error:
            raise UserError(
                f"{what} must hold regular expressions; got {pattern!r} ({error})."
            ) from None
        if not hits and not none_ok:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise UserError(
                f"A pattern must match a parameter path; got {what}={pattern!r}, which matches "
                f"none of {len(paths)}. Nearest paths: {', '.join(near)}."
            )
        found.append(hits)
    return found


def trainable_mask(params: PyTree, freeze: Sequence[str] = ()) -> PyTree:
    """True for each parameter that no pattern of `freeze` matches (tree without boxes)."""
    frozen = set().union(*matching(freeze, [x.path for x in leaves(params)], what="freeze"))
    return jax.tree_util.tree_map_with_path(
        lambda p, _: sharding.path_of(p) not in frozen, sharding.unbox(params)
    )


def layer_rates(
    table: Sequence[Leaf], decay: float, *, blocks: str = ENCODER_BLOCKS, embedding: str = EMBEDDING
) -> dict[str, float | tuple[float, ...]]:
    """Layer-wise learning-rate multipliers, decay ** (E + 1 - i).

    Embeddings (patches, positions, class token) have i = 0, block b of E has i = b + 1, the rest
    (pooling, norms, head) has i = E + 1, i.e. multiplier 1.

    Args:
        table: from `leaves`.
        decay: in (0, 1].
        blocks: pattern of the blocks' paths, which have a part 'blocks' (stacked) or 'blocks_3' or
            'blocks/3' (numbered).
        embedding: pattern of the embeddings' paths.

    Returns:
        Path -> multiplier, or one multiplier per layer for stacked parameters.

    Raises:
        UserError: no blocks, or blocks in stacks of different depth.

    Source: InternVideo2 `LayerDecayValueAssigner`; BEiT.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_decay must be in (0, 1]; got layer_decay={decay}.")
    paths = [x.path for x in table]
    in_blocks = matching(blocks, paths, what="blocks of layer_decay")[0]
    numbers = {p: _block_number(p) for p in in_blocks}
    depths = {x.shape[x.stacked] for x in table if x.path in in_blocks and x.stacked is not None}
    if any(n is not None for n in numbers.values()):
        depths.add(1 + max(n for n in numbers.values() if n is not None))
    stacks = {re.split(r"(?:^|/)blocks?(?:[_/]|$)", p)[0] for p in in_blocks}
    if len(depths) != 1 or len(stacks) != 1:
        raise UserError(
            f"Layer-wise decay needs one stack of blocks; the pattern {blocks!r} finds depths "
            f"{sorted(depths)} in {sorted(stacks)[:4]}. Narrow it, e.g. "
            "layer_decay=dict(decay=..., blocks='^encoder/blocks')."
        )
    depth = depths.pop()
    rates: dict[str, float | tuple[float, ...]] = {}
    for leaf in table:
        if leaf.path in in_blocks and leaf.stacked is not None:
            rates[leaf.path] = tuple(decay ** (depth - b) for b in range(depth))
        elif numbers.get(leaf.path) is not None:
            rates[leaf.path] = decay ** (depth - numbers[leaf.path])
        else:
            rates[leaf.path] = decay ** (depth + 1) if re.search(embedding, leaf.path) else 1.0
    return rates


def _block_number(path: str) -> int | None:
    """b of 'blocks_b/...' or 'blocks/b/...', else None."""
    found = re.search(r"blocks?[_/](\d+)(/|$)", path)
    return int(found.group(1)) if found else None


def plan(
    name: str,
    params: PyTree,
    *,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    lr_multipliers: Sequence[tuple[str, float]] = (),
    layer_decay: float | Mapping[str, Any] | None = None,
    freeze: Sequence[str] = (),
    muon: Sequence[str] = (),
) -> list[Leaf]:
    """Decides rule, weight decay and rate of every parameter; arguments as in `make_optimizer`."""
    table = leaves(params)
    paths = [x.path for x in table]
    spared = set().union(*matching(no_decay, paths, what="no_decay"))
    frozen = set().union(*matching(freeze, paths, what="freeze"))
    factors: dict[str, float] = {}
    said = matching([p for p, _ in lr_multipliers], paths, what="lr_multipliers")
    for (_, factor), hits in zip(lr_multipliers, said):
        factors = {path: factor for path in hits} | factors  # the first match wins
    layered = {}
    if layer_decay is not None:
        given = dict(decay=layer_decay) if isinstance(layer_decay, (int, float)) else layer_decay
        layered = layer_rates(table, **given)
    chosen = set().union(*matching(muon, paths, what="muon"))

    def decide(leaf: Leaf) -> Leaf:
        rule = name
        if name == "muon":
            block = leaf.path in chosen if muon else bool(re.search(BLOCKS, leaf.path))
            rule = "muon" if block and leaf.ndim == 2 else "adamw"
        if leaf.path in frozen:
            rule = "frozen"
        decays = leaf.ndim > 1 and leaf.path not in spared
        decays = decays and not leaf.path.endswith("bias")
        decays = decays and not any(re.search(p, leaf.path) for p in NO_DECAY)
        rate, factor = layered.get(leaf.path, 1.0), factors.get(leaf.path, 1.0)
        rate = tuple(r * factor for r in rate) if isinstance(rate, tuple) else rate * factor
        decay = weight_decay if decays and rule != "frozen" else 0.0
        return dataclasses.replace(leaf, rule=rule, weight_decay=decay, rate=rate)

    return [decide(leaf) for leaf in table]


# -------------------------------------------------------------------------------------- optimisers


def make_optimizer(
    name: str,
    *,
    schedule: Schedule,
    params: PyTree,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.95,
    no_decay: Sequence[str] = (),
    lr_multipliers: Sequence[tuple[str, float]] = (),
    layer_decay: float | Mapping[str, Any] | None = None,
    freeze: Sequence[str] = (),
    muon: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, list[Leaf]]:
    """An optimiser over the whole parameter tree, and what it does with each parameter.

    The update of a parameter is -schedule(n) * rate * (direction + weight_decay * parameter), n the
    number of updates made so far; a frozen one has no state and update 0.

    Args:
        name: 'adamw'; 'muon' (Muon for the 2-D kernels of the blocks, AdamW for the rest, both with
            one schedule: Muon's direction has the root mean square 0.2 of AdamW's); 'lion'; 'sgd'.
        params: (abstract) tree, boxed with axis names, so that stacked layers are known.
        betas, eps: of AdamW and Lion.
        momentum: of Muon and SGD.
        no_decay: patterns spared from weight decay besides every parameter that is 1-D in its
            layer, every `bias`, and the tokens and position tables of `NO_DECAY`.
        lr_multipliers: (pattern, factor) pairs; multiplies the layer-wise rate.
        layer_decay: decay, or dict(decay=, blocks=, embedding=) of `layer_rates`.
        freeze: patterns of parameters that stay as they are.
        muon: patterns of the 2-D kernels that Muon updates, instead of those of the blocks.

    Raises:
        UserError: unknown name; a pattern that matches nothing; nothing left to train.

    Source: Muon's scale: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
    """
    if name not in OPTIMIZERS:
        raise UserError(f'Unknown optimizer "{name}".{nearest(name, OPTIMIZERS)}')
    if muon and name != "muon":
        raise UserError(f'muon patterns belong to optimizer "muon"; got them with name="{name}".')
    table = plan(
        name,
        params,
        weight_decay=weight_decay,
        no_decay=no_decay,
        lr_multipliers=lr_multipliers,
        layer_decay=layer_decay,
        freeze=freeze,
        muon=muon,
    )
    by_path = {leaf.path: leaf for leaf in table}
    rules = {
        "adamw": lambda: optax.scale_by_adam(*betas, eps=eps),
        "muon": lambda: _scale_by_muon(by_path, momentum),
        "lion": lambda: optax.scale_by_lion(*betas),
        "sgd": lambda: optax.trace(momentum),
        "frozen": optax.set_to_zero,
    }
    used = {leaf.rule for leaf in table}
    if used == {"frozen"}:
        raise UserError(f"Something must be trainable; freeze={tuple(freeze)} matches everything.")
    directions = {rule: rules[rule]() for rule in sorted(used)}
    labels = lambda tree: _by_path(lambda path, _: by_path[path].rule, tree)
    tx = optax.chain(
        _at_least_float32(),
        optax.partition(directions, labels),
        _decay_and_rate(by_path),
        optax.scale_by_learning_rate(schedule),
    )
    return tx, table


def _by_path(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda p, *x: function(sharding.path_of(p), *x), tree, *rest
    )


def _at_least_float32() -> optax.GradientTransformation:
    """Moments and updates are float32 even where gradients come in bfloat16."""
    widen = lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return optax.stateless(lambda updates, params: jax.tree.map(widen, updates))


def _scale_by_muon(by_path: Mapping[str, Leaf], momentum: float) -> optax.GradientTransformation:
    def dimensions(tree: PyTree) -> PyTree:
        def one(path: str, x: jax.Array) -> contrib.MuonDimensionNumbers:
            matrix = [i for i in range(x.ndim) if i != by_path[path].stacked]
            return contrib.MuonDimensionNumbers(*matrix)  # the 'layers' dimension is a batch

        return _by_path(one, tree)

    def to_adamw_size(updates: PyTree, params: PyTree) -> PyTree:
        def one(path: str, u: jax.Array) -> jax.Array:
            sizes = [n for i, n in enumerate(u.shape) if i != by_path[path].stacked]
            return u * (0.2 * math.sqrt(max(sizes)))

        return _by_path(one, updates)

    return optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless(to_adamw_size),
    )


def _decay_and_rate(by_path: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """rate * (update + weight_decay * parameter), each per parameter."""

    def one(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        leaf = by_path[path]
        if leaf.weight_decay:
            update = update + leaf.weight_decay * param
        if isinstance(leaf.rate, tuple):
            shape = [1] * update.ndim
            shape[leaf.stacked] = -1
            return update * np.asarray(leaf.rate, update.dtype).reshape(shape)
        return update if leaf.rate == 1.0 else update * leaf.rate

    return optax.stateless(lambda updates, params: _by_path(one, updates, params))
