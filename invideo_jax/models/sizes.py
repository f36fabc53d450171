"""Published model sizes, in one table; every row's parameter count is asserted by a test."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest


@dataclasses.dataclass(frozen=True)
class VideoMAESize:
    """One row: encoder D, layers, heads K, MLP width F; decoder the same; patch side in pixels.

    `params` is the number of parameters of the pretraining model with the published 16 frames,
    None for sizes that nobody published; `encoder_params` the same of the encoder with its last norm.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int
    patch: int = 16
    encoder_params: int | None = None
    params: int | None = None


_Row = VideoMAESize

# Sources: S, B, L, H: MCG-NJU/VideoMAE modeling_pretrain.py and scripts/ (decoder depth is a
# command-line value there); H-internvideo1: OpenGVLab/InternVideo, InternVideo1/Pretrain/VideoMAE;
# L-v2, g: VideoMAE V2 (arXiv:2303.16727). Micro, Mini and Ti are this project's own, for CPUs.
VIDEO_MAE: dict[str, VideoMAESize] = {
    "Micro": _Row(32, 2, 2, 128, 16, 1, 2, 64, patch=8),
    "Mini": _Row(128, 4, 4, 512, 64, 2, 2, 256, patch=8),
    "Ti": _Row(192, 12, 3, 768, 96, 4, 3, 384),
    "S": _Row(384, 12, 6, 1536, 192, 4, 3, 768, 16, 21_879_936, 24_029_376),
    "B": _Row(768, 12, 12, 3072, 384, 4, 6, 1536, 16, 86_227_200, 94_210_944),
    "L": _Row(1024, 24, 16, 4096, 512, 12, 8, 2048, 16, 303_860_736, 342_996_992),
    "L-v2": _Row(1024, 24, 16, 4096, 512, 4, 8, 2048, 16, 303_860_736, 317_782_016),
    "H": _Row(1280, 32, 16, 5120, 640, 12, 8, 2560, 16, 631_607_040, 692_487_296),
    "H-internvideo1": _Row(1280, 32, 16, 5120, 512, 8, 8, 2048, 16, 631_607_040, 658_266_880),
    "g": _Row(1408, 40, 16, 6144, 512, 4, 8, 2048, 14, 1_011_610_752, 1_025_543_960),
}


@dataclasses.dataclass(frozen=True)
class VideoSize:
    """One row: D, layers, heads K, MLP width F; patch side; the attention pool's heads and width P.

    `params` is the number of parameters with the pool and the published 8 frames, None for sizes
    that nobody published; `trunk_params` the same without the pool.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int = 14
    pool_heads: int = 16
    pool_width: int = 768
    trunk_params: int | None = None
    params: int | None = None


_Video = VideoSize

# Source: OpenGVLab/InternVideo, InternVideo2/single_modality/models. Nano, Micro and Mini are this
# project's own, for CPUs.
INTERNVIDEO2: dict[str, VideoSize] = {
    "Nano": _Video(32, 2, 2, 64, 8, 4, 32),
    "Micro": _Video(48, 3, 3, 96, 8, 4, 32),
    "Mini": _Video(128, 4, 4, 512, 8, 4, 128),
    "S": _Video(384, 12, 6, 1536, 14, 16, 768, 22_302_336, 23_043_840),
    "B": _Video(768, 12, 12, 3072, 14, 16, 768, 87_072_000, 89_438_976),
    "L": _Video(1024, 24, 16, 4096, 14, 16, 768, 304_987_136, 308_929_280),
    "1B": _Video(1408, 40, 16, 6144, 14, 16, 768, 1_013_666_432, 1_020_708_608),
    "6B": _Video(3200, 48, 25, 12800, 14, 16, 768, 5_908_528_000, 5_941_735_168),
}


@dataclasses.dataclass(frozen=True)
class BeatsSize:
    """One row: D, layers, heads K, MLP width F, width of the patches; the position convolution.

    `params` is the number of parameters of the published file, None for sizes that nobody published.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    embed: int = 512
    conv_positions: int = 128
    conv_groups: int = 16
    params: int | None = None


# Source: BEATs (arXiv:2212.09058) 4.2. Micro is this project's own, for tests.
BEATS: dict[str, BeatsSize] = {
    "Micro": BeatsSize(32, 2, 2, 64, 24, 8, 4),
    "B": BeatsSize(768, 12, 12, 3072, params=90_311_792),
}


@dataclasses.dataclass(frozen=True)
class AudioViTSize:
    """One row: D, layers, heads K, MLP width F; `params` with fixed positions."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    params: int | None = None


# This project's own, with the widths of VideoMAE's sizes of these names.
AUDIO_VIT: dict[str, AudioViTSize] = {
    "Micro": AudioViTSize(32, 2, 2, 64),
    "Mini": AudioViTSize(128, 4, 4, 512),
    "S": AudioViTSize(384, 12, 6, 1536, 21_388_416),
    "B": AudioViTSize(768, 12, 12, 3072, 85_244_160),
}


@dataclasses.dataclass(frozen=True)
class BertSize:
    """One row: D, blocks, heads K, MLP width F, number of the first fusion block.

    `params` is the number of parameters of the published file, without cross-attention and with the
    head for words, None for sizes that nobody published.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    fusion_from: int
    params: int | None = None


# Source: BERT (arXiv:1810.04805), divided as in InternVideo2's stage 2. Micro and Mini are this project's own.
BERT: dict[str, BertSize] = {
    "Micro": BertSize(32, 3, 2, 64, 2),
    "Mini": BertSize(128, 4, 4, 512, 2),
    "B": BertSize(768, 12, 12, 3072, 9, 109_514_298),
    "L": BertSize(1024, 24, 16, 4096, 19, 335_174_458),
}


@dataclasses.dataclass(frozen=True)
class ClipTextSize:
    """One row: D, blocks, heads K, MLP width F, width P of the shared space.

    `params` is the number of parameters with CLIP's words and places, None for sizes that nobody
    published.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    output_width: int
    params: int | None = None


# Source: CLIP (arXiv:2103.00020); MobileCLIP-B (arXiv:2311.17049) has B with another activation.
CLIP_TEXT: dict[str, ClipTextSize] = {
    "Micro": ClipTextSize(32, 2, 2, 64, 32),
    "Mini": ClipTextSize(128, 4, 4, 512, 128),
    "B": ClipTextSize(512, 12, 8, 2048, 512, 63_428_096),
    "L": ClipTextSize(768, 12, 12, 3072, 768, 123_650_304),
}


@dataclasses.dataclass(frozen=True)
class LlamaSize:
    """One row: D, blocks, heads K, MLP width F, P; heads of keys and values; rank of LoRA; words.

    `params` is the number of parameters, without the head for next words, None for sizes that nobody
    published.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    output_width: int
    kv_heads: int
    lora_rank: int
    vocabulary: int
    params: int | None = None


# Sources: LLaMA (arXiv:2302.13971), table 2, as the text tower of InternVideo2-CLIP 1B and 6B: InternVL
# (arXiv:2312.14238) 3.2, internvideo2_clip_text.py, with the words of chinese-alpaca.
LLAMA: dict[str, LlamaSize] = {
    "Micro": LlamaSize(32, 2, 4, 64, 32, 2, 4, 512),
    "7B": LlamaSize(4096, 32, 32, 11008, 768, 32, 16, 49954, 6_692_417_536),
}


def row(table: Mapping[str, Any], size: str) -> Any:
    """The row of a table called `size`.

    Raises:
        UserError: unknown size.
    """
    if size not in table:
        raise UserError(
            f"The model size must be a row of the table; got size={size!r}.{nearest(size, table)}"
        )
    return table[size]


def video_mae(size: str) -> VideoMAESize:
    """The row called `size`.

    Raises:
        UserError: unknown size.
    """
    if size not in VIDEO_MAE:
        raise UserError(
            f"The model size must be a row of the table; got size={size!r}.{nearest(size, VIDEO_MAE)}"
        )
    return VIDEO_MAE[size]


def internvideo2(size: str) -> VideoSize:
    """The row of `INTERNVIDEO2` called `size`.

    Raises:
        UserError: unknown size.
    """
    if size not in INTERNVIDEO2:
        raise UserError(
            "The model size must be a row of the table; got "
            f"size={size!r}.{nearest(size, INTERNVIDEO2)}"
        )
    return INTERNVIDEO2[size]
