"""InternVideo2-CLIP, 6B: as `clip_1b.py`, at the largest size.

    python -m invideo_jax.train --config=configs/internvideo2/clip_6b.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=LLAMA_FOLDER \
        --config.stages.contrastive.init.source='stage2=STAGE2;text=INTERNVL_TEXT'

`clip_1b.py` says what these folders are, and what differs. After the colon: `smoke`.

Hardware and hours: published with 128 videos and 128 images on each of 16 A100; hours not published; not run at full
size by this project.
Published result: MSR-VTT zero-shot R@1 50.9 text to video, 50.6 video to text.

Sources: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo
InternVideo2/multi_modality/scripts/pretraining/clip/6B/config.py.
"""

from configs import common
from configs.internvideo2 import clip_1b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    return clip_1b.recipe("6B", words, gpu_rows=128, epochs=1, warmup=0.2, drop_path=0.35)
