"""Transformer blocks, and the stack that scans, unrolls and rematerialises them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from invideo_jax.errors import UserError
from invideo_jax.models.attention import attend
from invideo_jax.registry import nearest
from invideo_jax.sharding import constrain

PyTree = Any
Initializer = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of CLIP
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

_POLICIES = jax.checkpoint_policies
# What the forward pass keeps for the backward pass; the rest is computed again.
REMAT: dict[str, Callable | None] = {
    "none": None,  # keep everything: no rematerialisation
    "full": _POLICIES.nothing_saveable,  # keep only each block's input
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "save_qkv_mlp": _POLICIES.save_only_these_names("query", "key", "value", "mlp_hidden"),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function called `name`; UserError for an unknown one."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"The activation must be known; got activation={name!r}.{nearest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def named(init: Initializer, *axes: str | None) -> Initializer:
    """`init` with logical axis names on what it gives."""
    return nn.with_logical_partitioning(init, axes)


def xavier(fan_in: int, fan_out: int) -> Initializer:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)), whatever the shape of the array."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class Linear(nn.Module):
    """x @ kernel + bias, computed in `dtype`.

    Attributes:
        features: width of the output.
        axes: logical names of the kernel's two dimensions.
        bias_axis: logical name of the bias, None for no bias.
        kernel_init: default Xavier-uniform of the kernel's own shape.
    """

    features: int
    axes: tuple[str | None, str | None]
    bias_axis: str | None = "norm"
    kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = self.kernel_init or xavier(x.shape[-1], self.features)
        kernel = self.param("kernel", named(init, *self.axes), (x.shape[-1], self.features))
        y = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias_axis is None:
            return y
        bias = self.param("bias", named(self.bias_init, self.bias_axis), (self.features,))
        return y + bias.astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with float32 statistics (float64 stays float64); the result is in `dtype`."""

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), (width,))
        bias = self.param("bias", named(nn.initializers.zeros_init(), "norm"), (width,))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with separate 2-D kernels [D, K*head]; keys have no bias.

    Attributes:
        heads: K.
        qkv_bias: bias on queries and values (on keys it would change nothing).
    """

    heads: int
    qkv_bias: bool = True
    scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        # The published layer is one [D, 3D] matrix, and Xavier's bound is taken from that shape.
        into = functools.partial(
            Linear,
            width,
            ("embed", "heads"),
            kernel_init=xavier(width, 3 * width),
            dtype=self.dtype,
        )
        bias = "heads" if self.qkv_bias else None
        query = checkpoint_name(into(bias_axis=bias, name="query")(x), "query")
        key = checkpoint_name(into(bias_axis=None, name="key")(x), "key")
        value = checkpoint_name(into(bias_axis=bias, name="value")(x), "value")
        mixed = attend(query, key, value, heads=self.heads, scale=self.scale)
        return Linear(width, ("heads", "embed"), dtype=self.dtype, name="out")(mixed)


class Mlp(nn.Module):
    """Linear, activation, Linear; `width` is F."""

    width: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(self.width, ("embed", "mlp"), "mlp", dtype=self.dtype, name="up")(x)
        hidden = constrain(checkpoint_name(hidden, "mlp_hidden"), "batch", "tokens", "act_mlp")
        hidden = activation(self.activation)(hidden)
        return Linear(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="down")(hidden)


def drop_path(branch: jax.Array, keys: jax.Array, rate: jax.Array) -> jax.Array:
    """Stochastic depth: drops the branch of whole examples, and scales up the kept ones.

    Args:
        branch: [B, N, D].
        keys: one random key for each example, [B].
        rate: share of examples dropped, in [0, 1).
    """
    keep = 1.0 - rate
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep))(keys)
    return jnp.where(kept[:, None, None], branch / keep, 0).astype(branch.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        layer_scale: initial value of a learned factor on each branch; 0 for none.
    """

    heads: int
    mlp_width: int
    qkv_bias: bool = True
    scale: float | None = None
    activation: str = "gelu"
    eps: float = 1e-6
    layer_scale: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: jax.Array | None = None, rate: jax.Array | float = 0.0
    ) -> jax.Array:
        """`x` [B, N, D]; `keys` [B] drop paths at `rate`, None keeps all."""
        x = constrain(x, "batch", "tokens", "act_embed")
        y = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        y = Attention(self.heads, self.qkv_bias, self.scale, self.dtype, name="attention")(y)
        x = x + self._branch(y, "scale1", keys, 0, rate)
        y = LayerNorm(self.eps, self.dtype, name="norm2")(x)
        y = Mlp(self.mlp_width, self.activation, self.dtype, name="mlp")(y)
        x = x + self._branch(y, "scale2", keys, 1, rate)
        return constrain(x, "batch", "tokens", "act_embed")

    def _branch(self, y, name, keys, which, rate):
        if self.layer_scale:
            init = named(nn.initializers.constant(self.layer_scale), "norm")
            y = (y * self.param(name, init, y.shape[-1:])).astype(y.dtype)
        if keys is None:
            return y
        return drop_path(y, jax.vmap(lambda k: jax.random.fold_in(k, which))(keys), rate)


class Stack(nn.Module):
    """`depth` equal blocks; parameters are stored stacked, [layers, ...], whichever way they run.

    Attributes:
        block: makes one unbound block: `block(parent=None)`.
        scan: run as one `lax.scan` (program size and compile time do not grow with depth), else
            unrolled (faster on CPU). Values and gradients are the same.
        remat: a key of `REMAT`.
        drop_path: rate of the last block; block i has i / (depth - 1) of it.
        draws: blocks take random keys for more than drop path.
    """

    block: Callable[..., nn.Module]
    depth: int
    scan: bool = False
    remat: str = "none"
    drop_path: float = 0.0
    draws: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *context: jax.Array | None,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
        span: tuple[int, int] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the blocks.

        Args:
            x: [B, N, D].
            context: what every block is given besides x, [B, ...]: masks, tokens of another stack.
            keys: [B] random keys for drop path, None when evaluating.
            features: blocks whose outputs are wanted; negative ones count from the end.
            span: run blocks span[0] .. span[1] - 1 only (something happens in between). None: all.

        Returns:
            The last block's output, and {'block<i>': [B, N, D]} for the blocks asked for.
        """
        wanted = [_block_index(i, self.depth) for i in features]
        block = self.block(parent=None)
        params = self.param(
            "blocks", functools.partial(_init_stacked, block, self.depth), x, context
        )
        rates = np.linspace(0.0, self.drop_path, self.depth, dtype=np.float32)
        keys = keys if self.drop_path or self.draws else None
        first, last = span or (0, self.depth)
        if span is not None:
            params = jax.tree.map(lambda p: p[first:last], params)

        def body(x, layer):
            params, rate, index = layer
            own = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
            return block.apply({"params": params}, x, own, rate, *context)

        body = _rematerialised(body, self.remat, scan=self.scan)
        if self.scan:
            step = lambda x, layer: (lambda y: (y, y if wanted else None))(body(x, layer))
            x, outputs = jax.lax.scan(step, x, (params, rates[first:last], np.arange(first, last)))
        else:
            outputs = []
            for i, layer in enumerate(_unstack(params, last - first), start=first):
                x = body(x, (layer, rates[i], i))
                outputs.append(x)
        return x, {f"block{i}": outputs[i - first] for i in wanted}


def _block_index(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise UserError(
            f"A feature must name a block of 0..{depth - 1} (or -{depth}..-1 from the end); "
            f"got features={index}."
        )
    return index % depth


def _init_stacked(
    block: nn.Module, depth: int, key: jax.Array, x: jax.Array, context: Sequence[Any]
) -> PyTree:
    # Parameters do not depend on the numbers of examples and tokens: one of each is enough, but
    # for a context, whose masks must fit the tokens.
    one = jnp.zeros_like(x[:1] if context else x[:1, :1], jnp.float32)
    context = jax.tree.map(lambda c: c[:1], tuple(context))
    initial = lambda k: block.init(k, one, None, 0.0, *context)["params"]
    stacked = jax.vmap(initial)(jax.random.split(key, depth))
    is_box = lambda x: isinstance(x, meta.AxisMetadata)
    add = lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"})
    return jax.tree.map(add, stacked, is_leaf=is_box)


def _rematerialised(body: Callable, remat: str, *, scan: bool) -> Callable:
    if remat not in REMAT:
        raise UserError(f"remat must be a policy; got remat={remat!r}.{nearest(remat, REMAT)}")
    if remat == "none":
        return body
    # Inside a scan the compiler cannot undo rematerialisation, so its guard would only cost time.
    return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not scan)


def _unstack(params: PyTree, depth: int) -> list[PyTree]:
    """One tree per layer. By `lax.split`, whose gradient is one concatenation of the layers'
    gradients; indexing would pad each to the whole stack and add them up."""
    leaves, tree = jax.tree.flatten(params)
    split = [[jnp.squeeze(p, 0) for p in jax.lax.split(x, (1,) * depth)] for x in leaves]
    return [tree.unflatten(layer) for layer in zip(*split)]
