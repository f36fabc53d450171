"""InternVideo2 stage 1, 6B: unmasked tokens aligned with InternVL-6B and VideoMAE V2-g.

    python -m invideo_jax.train --config=configs/internvideo2/stage1_6b.py --workdir=DIR \
        --config.data.train=FOLDER_OR_MANIFEST \
        --config.stages.aligned.teachers.clip.source=DIR_OF_INTERNVL \
        --config.stages.aligned.teachers.mae.source=DIR_OF_VIDEOMAE

After the colon: `smoke`, with small random teachers on the built-in data. See `stage1_1b.py` for the teachers.

Hardware and hours: published on 256 A100 (batch 8 each), 18 days for 300 epochs of K-Mash-2M; not run at full size by this
project.
Published result: Kinetics-400 91.9 % after fine-tuning, 8 frames (92.1 % with 16).

Sources: InternVideo2 (arXiv:2403.15377) 3.1 and appendix; OpenGVLab/InternVideo
InternVideo2/single_modality/scripts/pretraining/6B_pt.sh.
"""

from configs import common
from configs.internvideo2 import stage1_1b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = stage1_1b.get_config()
    c.model.size = "6B"
    c.model.drop_path = 0.3
    c.stages.aligned.batch_size = 256 * 8
    return common.smoke(c) if words["smoke"] else c
