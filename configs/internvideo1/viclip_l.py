"""ViCLIP-L/14: as `viclip_b.py`, at another size.

    python -m invideo_jax.train --config=configs/internvideo1/viclip_l.py --workdir=DIR \
        --config.data.train=VIDEOS.json --config.stages.contrastive.text.tokenizer=CLIP_FOLDER \
        --config.stages.contrastive.init.source='vision/encoder=CLIP_VISION;text=CLIP_TEXT'

`viclip_b.py` says what these folders are. After the colon: `unmasked` and `smoke`, as there.

Hardware and hours: as of `viclip_b.py`; not run at full size by this project.
Published result: MSR-VTT zero-shot R@1 42.4 text to video, 41.3 video to text.

Sources: InternVid (arXiv:2307.06942) 4; OpenGVLab/InternVideo InternVideo1/Pretrain/ViCLIP.
"""

from configs import common
from configs.internvideo1 import viclip_b


def get_config(arg=None):
    words = common.parse_arg(arg, "unmasked", "smoke")
    return viclip_b.recipe("L", words, rate=4e-4)
