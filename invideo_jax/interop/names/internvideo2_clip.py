"""InternVideo2-CLIP: S, B, L with MobileCLIP's text tower, 1B and 6B with InternVL's."""

from invideo_jax.interop.names import llama
from invideo_jax.interop.names.internvideo2 import pool, trunk
from invideo_jax.interop.names.internvideo2_stage2 import mobileclip
from invideo_jax.interop.names.rows import Layout, Row, linear, norm

_TEMPERATURE = Row("temp", ("temperature",))

LAYOUTS: dict[str, Layout] = {
    "internvideo2_clip": Layout(
        (
            _TEMPERATURE,
            *trunk("vision_encoder.", "vision/encoder/"),
            *norm("vision_align.0", "vision/align_norm"),
            *linear("vision_align.1", "vision/align"),
            *mobileclip("text_encoder.", "text/"),
        )
    ),
    # 1B and 6B, whole.
    "internvideo2_clip_llama": Layout(
        (
            _TEMPERATURE,
            *trunk("vision_encoder.", "vision/encoder/"),
            *llama.text("text_encoder.", "text/"),
        ),
        aliases=llama.ALIASES,
        unused=llama.BUFFERS,
    ),
    # What the released files of 1B and 6B hold: that alone was trained.
    "internvideo2_clip_head": Layout((_TEMPERATURE, *pool("vision_encoder.clip_projector"))),
}
