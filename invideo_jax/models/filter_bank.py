"""What towers of sounds share: patches of a filter bank."""

import jax
import jax.numpy as jnp

from invideo_jax.errors import UserError


class Sound:
    """What audio towers share: patches of a filter bank, and which of them are real.

    Attributes:
        patch: side of a patch, in frames and in mel bins.
        mels: bins of the filter bank.
        mask_padding: frames behind a sound's end count for nothing.
    """

    patch: int
    mels: int
    mask_padding: bool

    def grid(self, frames: int) -> tuple[int, int]:
        """(patches in time, patches in frequency) of a filter bank of so many frames."""
        return frames // self.patch, self.mels // self.patch

    def patches(self, audio: jax.Array) -> jax.Array:
        """Patches [B, A, patch*patch] of `audio` [B, F, mels], by time and then by frequency.

        Frames behind the last whole patch are left out, as the published convolution does.
        """
        if audio.ndim != 3 or audio.shape[2] != self.mels or audio.shape[1] < self.patch:
            raise UserError(
                f"A filter bank must be [B, F, mels] = [B, {self.patch} or more, {self.mels}]; got "
                f"shape={list(audio.shape)}. Set mels of the data and of the model alike."
            )
        (times, bands), p = self.grid(audio.shape[1]), self.patch
        cut = audio[:, : times * p].reshape(-1, times, p, bands, p)
        return cut.swapaxes(2, 3).reshape(-1, times * bands, p * p)

    def real(self, frames: jax.Array, tokens: int) -> jax.Array:
        """Which of `tokens` tokens hold a real frame, bool [B, A], of `frames` [B] real frames."""
        times = -(-jnp.asarray(frames) // self.patch)
        return jnp.arange(tokens)[None] // (self.mels // self.patch) < times[:, None]

    def seen(self, frames: jax.Array, tokens: int) -> jax.Array:
        """Which tokens others may look at, bool [B, A]: real ones, or all of an example with sound."""
        if self.mask_padding:
            return self.real(frames, tokens)
        return jnp.broadcast_to(jnp.asarray(frames)[:, None] > 0, (len(frames), tokens))

    def masked(self, frames: jax.Array | None, tokens: int) -> jax.Array | None:
        """`real` where padding is masked and the frames are known, else None."""
        return self.real(frames, tokens) if self.mask_padding and frames is not None else None


def mean(tokens: jax.Array, real: jax.Array | None) -> jax.Array:
    """The mean [B, D] of the real ones of tokens [B, A, D]; 0 where none is."""
    if real is None:
        return tokens.mean(axis=1)
    wide = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
    total = jnp.where(real[..., None], wide, 0).sum(axis=1)
    return (total / jnp.maximum(real.sum(axis=1), 1)[:, None]).astype(tokens.dtype)
