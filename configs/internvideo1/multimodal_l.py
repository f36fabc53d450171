"""InternVideo's multimodal branch, L/14: as `multimodal_b.py`, at another size.

    python -m invideo_jax.train --config=configs/internvideo1/multimodal_l.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=CLIP_FOLDER \
        --config.stages.contrastive.init.source='vision/encoder/backbone=CLIP_VISION;text=CLIP_TEXT'

`multimodal_b.py` says what these folders are, and what is published. After the colon: `smoke`.

Hardware and hours: not published; not run at full size by this project.
Published result: MSR-VTT zero-shot R@1 40.7 text to video, 39.6 video to text.

Sources: InternVideo (arXiv:2212.03191) 3.2; OpenGVLab/InternVideo InternVideo1/Pretrain/Multi-Modalities-Pretraining.
"""

from configs import common
from configs.internvideo1 import multimodal_b


def get_config(arg=None):
    return multimodal_b.recipe("L", common.parse_arg(arg, "smoke"))
