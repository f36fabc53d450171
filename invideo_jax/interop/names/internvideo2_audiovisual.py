"""InternVideo2's stage 2 with sound (6B)."""

from invideo_jax.interop.names.beats import ALIASES, beats
from invideo_jax.interop.names.internvideo2 import aligned
from invideo_jax.interop.names.internvideo2_stage2 import bert
from invideo_jax.interop.names.rows import Layout, Row, linear, norm, optional


def _tokens(theirs: str, ours: str) -> list[Row]:
    return [*linear(f"{theirs}.0", f"{ours}/linear"), *norm(f"{theirs}.1", f"{ours}/norm")]


# InternVideo2_Stage2_audiovisual; a model without sound lacks the rows of sound, and each matching head
# is there only where its loss is.
LAYOUTS: dict[str, Layout] = {
    "internvideo2_stage2_audiovisual": Layout(
        (
            Row("temp", ("temperature",)),
            *aligned("vision_encoder.", "vision/"),
            *_tokens("av_concat_vision_proj", "vision_tokens"),
            *bert("text_encoder.", "text/"),
            *optional(beats("audio_encoder.", "audio/")),
            *optional(linear("audio_proj", "audio_projection")),
            *optional(_tokens("av_concat_audio_proj", "audio_tokens")),
            *optional(linear("av_fusion", "av_fusion")),
            *optional(linear("atm_head", "audio_match_head")),
            *optional(linear("avtm_head", "av_match_head")),
            *linear("vision_proj", "vision_projection"),
            *linear("text_proj", "text_projection"),
            *optional(linear("itm_head", "match_head")),
        ),
        aliases=ALIASES,
        unused=(r"audio_encoder\.predictor\.(weight|bias)",),
    ),
}
