"""Transformer blocks, and the stack that scans, unrolls and rematerialises them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from invideo_jax.errors import UserError
from invideo_jax.models.attention import attend
from invideo_jax.registry import nearest
from invideo_jax.sharding import constrain, is_box, path_of

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


def uniform(bound: float) -> Initializer:
    """Uniform in +-bound. PyTorch starts linear and convolution layers so, at inputs^-0.5."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def xavier(fan_in: int, fan_out: int) -> Initializer:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)), whatever the shape of the array."""
    return uniform((6.0 / (fan_in + fan_out)) ** 0.5)


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


class RMSNorm(nn.Module):
    """x / root mean square, with float32 statistics (float64 stays float64), times a weight.

    The quotient is cast back to the dtype of `x` before the weight is multiplied, as published.

    Source: InternVideo2, `RMSNorm` of internvideo2_pretrain.py.
    """

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        square = jnp.square(wide).mean(-1, keepdims=True)
        y = (wide * jax.lax.rsqrt(square + self.eps)).astype(x.dtype)
        return (y * scale.astype(y.dtype)).astype(self.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


def norm(name: str) -> Callable[..., nn.Module]:
    """The normalisation called `name`; UserError for an unknown one."""
    if name not in NORMS:
        raise UserError(f"The norm must be known; got norm={name!r}.{nearest(name, NORMS)}")
    return NORMS[name]


class Attention(nn.Module):
    """Multi-head self-attention with separate 2-D kernels [D, K*head].

    Attributes:
        heads: K.
        qkv_bias: bias on queries and values.
        key_bias: bias on keys, which changes something only where keys are normalised.
        qk_norm: RMSNorm of queries and keys over all heads together.
        kernel_init: of all four kernels; None for Xavier-uniform.
        attend: how tokens attend, with the interface of `attention.attend`.
    """

    heads: int
    qkv_bias: bool = True
    key_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    eps: float = 1e-6
    kernel_init: Initializer | None = None
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`x` [B, N, D]; `mask` as in `attention.attend`."""
        width = x.shape[-1]
        # The published layer is one [D, 3D] matrix, and Xavier's bound is taken from that shape.
        into = functools.partial(
            Linear,
            width,
            ("embed", "heads"),
            kernel_init=self.kernel_init or xavier(width, 3 * width),
            dtype=self.dtype,
        )
        bias = lambda wanted: "heads" if wanted else None
        query = into(bias_axis=bias(self.qkv_bias), name="query")(x)
        key = into(bias_axis=bias(self.key_bias), name="key")(x)
        value = into(bias_axis=bias(self.qkv_bias), name="value")(x)
        query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
        value = checkpoint_name(value, "value")
        if self.qk_norm:
            query = RMSNorm(self.eps, self.dtype, name="query_norm")(query)
            key = RMSNorm(self.eps, self.dtype, name="key_norm")(key)
        masked = {} if mask is None else {"mask": mask}
        mixed = self.attend(query, key, value, heads=self.heads, scale=self.scale, **masked)
        out = functools.partial(Linear, kernel_init=self.kernel_init, dtype=self.dtype)
        return out(width, ("heads", "embed"), name="out")(mixed)


class Mlp(nn.Module):
    """Linear, activation, Linear; `width` is F."""

    width: int
    activation: str = "gelu"
    kernel_init: Initializer | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(Linear, kernel_init=self.kernel_init, dtype=self.dtype)
        hidden = linear(self.width, ("embed", "mlp"), "mlp", name="up")(x)
        hidden = constrain(checkpoint_name(hidden, "mlp_hidden"), "batch", "tokens", "act_mlp")
        hidden = activation(self.activation)(hidden)
        return linear(x.shape[-1], ("mlp", "embed"), name="down")(hidden)


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
        qkv_bias, key_bias, qk_norm: of `Attention`.
        norm: a key of `NORMS`.
        layer_scale: initial value of a learned factor on each branch; 0 for none.
        layer_scale_float32: whether that product is made in float32 and then cast.
        kernel_init: of all kernels; None for Xavier-uniform.
        attend: of `Attention`.
    """

    heads: int
    mlp_width: int
    qkv_bias: bool = True
    key_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    activation: str = "gelu"
    norm: str = "layer"
    eps: float = 1e-6
    layer_scale: float = 0.0
    layer_scale_float32: bool = True
    kernel_init: Initializer | None = None
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None = None,
        rate: jax.Array | float = 0.0,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`x` [B, N, D]; `keys` [B] drop paths at `rate`, None keeps all; `mask` of attention."""
        make_norm = norm(self.norm)
        attention = Attention(
            self.heads,
            self.qkv_bias,
            self.key_bias,
            self.qk_norm,
            self.scale,
            self.eps,
            self.kernel_init,
            self.dtype,
            self.attend,
            name="attention",
        )
        mlp = Mlp(self.mlp_width, self.activation, self.kernel_init, self.dtype, name="mlp")
        x = constrain(x, "batch", "tokens", "act_embed")
        y = attention(make_norm(self.eps, self.dtype, name="norm1")(x), mask)
        x = x + self._branch(y, "scale1", keys, 0, rate)
        y = mlp(make_norm(self.eps, self.dtype, name="norm2")(x))
        x = x + self._branch(y, "scale2", keys, 1, rate)
        return constrain(x, "batch", "tokens", "act_embed")

    def _branch(self, y, name, keys, which, rate):
        if self.layer_scale:
            init = named(nn.initializers.constant(self.layer_scale), "norm")
            factor = self.param(name, init, y.shape[-1:])
            factor = factor if self.layer_scale_float32 else factor.astype(y.dtype)
            y = (y * factor).astype(y.dtype)
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
        shrink: paths of parameters whose initial values are divided by sqrt(2 * layer), layer 1...
    """

    block: Callable[..., nn.Module]
    depth: int
    scan: bool = False
    remat: str = "none"
    drop_path: float = 0.0
    draws: bool = False
    shrink: Sequence[str] = ()

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
        wanted = sorted({_block_index(i, self.depth) for i in features})
        block = self.block(parent=None)
        init = functools.partial(_init_stacked, block, self.depth, self.shrink)
        params = self.param("blocks", init, x, context)
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
            layers = params, rates[first:last], np.arange(first, last)
            x, kept = _scan(body, x, layers, wanted)
        else:
            kept = []
            for i, layer in enumerate(unstack(params, last - first), start=first):
                x = body(x, (layer, rates[i], i))
                kept += [x] if i in wanted else []
        return x, {f"block{i}": kept[n] for n, i in enumerate(wanted)}


def _scan(body: Callable, x: jax.Array, layers: PyTree, wanted: Sequence[int]):
    """`body` over `layers`: the last output, and the outputs of the `wanted` layers, [K, B, N, D].

    Each layer writes its output into the place of the next wanted one, so that what stays there is
    the wanted one's, and memory does not grow with depth.
    """
    place = np.searchsorted(wanted, layers[-1]).astype(np.int32)
    kept = jnp.zeros((place.max(initial=-1) + 1 if wanted else 0, *x.shape), x.dtype)

    def step(carry, layer):
        x, kept = carry
        layer, place = layer
        x = body(x, layer)
        if wanted:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, place, 0)
            kept = constrain(kept, None, "batch", "tokens", "act_embed")
        return (x, kept), None

    (x, kept), _ = jax.lax.scan(step, (x, kept), (layers, place))
    return x, kept


def _block_index(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise UserError(
            f"A feature must name a block of 0..{depth - 1} (or -{depth}..-1 from the end); "
            f"got features={index}."
        )
    return index % depth


def _init_stacked(
    block: nn.Module,
    depth: int,
    shrink: Sequence[str],
    key: jax.Array,
    x: jax.Array,
    context: Sequence[jax.Array | None],
) -> PyTree:
    # Parameters do not depend on the numbers of examples and tokens: one of each is enough, but
    # for a context, whose masks must fit the tokens.
    one = jnp.zeros_like(x[:1] if context else x[:1, :1], jnp.float32)
    context = jax.tree.map(lambda c: c[:1], tuple(context))
    initial = lambda k: block.init(k, one, None, 0.0, *context)["params"]
    stacked = jax.vmap(initial)(jax.random.split(key, depth))
    divisor = np.sqrt(2.0 * np.arange(1, depth + 1)).astype(np.float32)

    def finish(key_path, box):
        if path_of(key_path) in shrink:
            box = box.replace_boxed(box.value / divisor.reshape(-1, *(1,) * (box.value.ndim - 1)))
        return box.add_axis(0, {nn.PARTITION_NAME: "layers"})

    return jax.tree_util.tree_map_with_path(finish, stacked, is_leaf=is_box)


def _rematerialised(body: Callable, remat: str, *, scan: bool) -> Callable:
    if remat not in REMAT:
        raise UserError(f"remat must be a policy; got remat={remat!r}.{nearest(remat, REMAT)}")
    if remat == "none":
        return body
    # Inside a scan the compiler cannot undo rematerialisation, so its guard would only cost time.
    return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not scan)


def unstack(params: PyTree, depth: int) -> list[PyTree]:
    """One tree per layer. By `lax.split`, whose gradient is one concatenation of the layers'
    gradients; indexing would pad each to the whole stack and add them up."""
    leaves, tree = jax.tree.flatten(params)
    split = [[jnp.squeeze(p, 0) for p in jax.lax.split(x, (1,) * depth)] for x in leaves]
    return [tree.unflatten(layer) for layer in zip(*split)]
