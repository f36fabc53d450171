"""Exact model FLOPs, by formula and by walking a traced program; peak rates of known chips.

A multiply-add counts as 2; only matrix products and convolutions count. The compiler's own
cost analysis is no substitute: it counts the body of a scan over layers once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def block_flops(tokens: int, *, width: int, mlp: int, keys: int | None = None) -> int:
    """Forward FLOPs of one transformer block on one sequence.

    Args:
        tokens: length of the sequence, attending to `keys` positions (default: itself).
        width: D.
        mlp: F.
    """
    keys = tokens if keys is None else keys
    projections = 2 * tokens * width * width + 2 * keys * width * width  # q and out; k and v
    return 2 * (projections + 2 * tokens * keys * width + 2 * tokens * width * mlp)


def video_mae_flops(
    *,
    tokens: int,
    visible: int,
    pixels: int,
    width: int,
    depth: int,
    mlp: int,
    decoder_width: int,
    decoder_depth: int,
    decoder_mlp: int,
    embedded: int | None = None,
) -> dict[str, int]:
    """Forward FLOPs of one clip through VideoMAE, part by part.

    Args:
        tokens: N, all cubes of the clip.
        visible: V; the rest is hidden and predicted.
        pixels: values in one cube, t*p*p*3.
        width, depth, mlp: of the encoder; the decoder likewise.
        embedded: cubes that the patch projection sees; default the visible ones only.

    Returns:
        'patch_embed', 'encoder', 'encoder_to_decoder', 'decoder', 'head'.
    """
    embedded = visible if embedded is None else embedded
    return {
        "patch_embed": 2 * embedded * pixels * width,
        "encoder": depth * block_flops(visible, width=width, mlp=mlp),
        "encoder_to_decoder": 2 * visible * width * decoder_width,
        "decoder": decoder_depth * block_flops(tokens, width=decoder_width, mlp=decoder_mlp),
        "head": 2 * (tokens - visible) * decoder_width * pixels,
    }


def training_flops(forward: dict[str, int]) -> int:
    """FLOPs of forward and backward: 3 x forward, without the gradient of the pixels.

    Recomputation (remat) does not count: this is the numerator of MFU.
    """
    return 3 * sum(forward.values()) - forward.get("patch_embed", 0)


def jaxpr_flops(function: Callable, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the program that `function` traces to, recomputation included.

    Follows scans (times their length), remat, pjit, custom derivatives, shard_map (times the
    number of shards) and takes the dearest branch of a cond. Counts before the compiler removes
    anything, over all devices together.

    Args:
        args, kwargs: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

    Raises:
        ValueError: matrix products inside a `while` loop, whose number of rounds is unknown, or
            inside a Pallas kernel.
    """
    return _walk(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _walk(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * (math.prod(kernel) // out_features)
    inner = [_walk(j) for j in _jaxprs(eqn.params)]
    if name == "cond":
        return max(inner)
    if name in ("while", "pallas_call") and sum(inner):
        raise ValueError(
            f"FLOPs can be counted only where the number of rounds is known; got matrix products "
            f"inside a {name}. Use lax.scan, or count that part by formula."
        )
    times = 1
    if name == "scan":
        times = eqn.params["length"]
    elif name == "shard_map":
        mesh = eqn.params["mesh"]
        named = "manual_axes" if "manual_axes" in eqn.params else "newly_manual_axes"
        times = math.prod(mesh.shape[a] for a in eqn.params[named])
    return times * sum(inner)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


# Dense bfloat16 (V100: float16) peak of one JAX device in FLOP/s: (part of `device_kind`, peak).
# The first that matches wins. A TPU v3 chip (123e12) and a TPU7x chip (2307e12) are two devices.
# Sources: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}; NVIDIA data sheets of V100, A100,
# H100, H200, B200 and L4 (figures without sparsity).
PEAKS = (
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 1153.5e12),
    ("V100", 125e12),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("L4", 121e12),
)


def device_peak_flops(device: Any | None = None) -> float | None:
    """Peak FLOP/s of a device, or None where it isn't known (CPUs, unlisted chips).

    Args:
        device: default the first of `jax.devices()`.
    """
    kind = (jax.devices()[0] if device is None else device).device_kind
    words = kind.replace("-", " ").split()
    for name, peak in PEAKS:
        # 'L4' must not match 'L40S': compare whole words.
        if _has_words(words, name.split()):
            return peak
    return None


def _has_words(words: list[str], wanted: list[str]) -> bool:
    starts = range(len(words) - len(wanted) + 1)
    return any(words[i : i + len(wanted)] == wanted for i in starts)
