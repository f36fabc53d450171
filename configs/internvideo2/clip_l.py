"""InternVideo2-CLIP, L: as `clip_b.py`, at another size.

    python -m invideo_jax.train --config=configs/internvideo2/clip_l.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=CLIP_FOLDER \
        --config.stages.contrastive.init.source='vision=K710;text=MOBILECLIP'

`clip_b.py` says what these folders are, and what differs. After the colon: `smoke`.

Hardware and hours: 256 videos and 256 images on each GPU; the number of GPUs and the hours are not published; not run
at full size by this project.
Published result: MSR-VTT zero-shot R@1 42.1 text to video, 44.1 video to text.

Sources: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo
InternVideo2/multi_modality/scripts/pretraining/clip/L14/config.py.
"""

from configs import common
from configs.internvideo2 import clip_b


def get_config(arg=None):
    return clip_b.recipe("L", common.parse_arg(arg, "smoke"))
