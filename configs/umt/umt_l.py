"""UMT stage 1, ViT-L/16: unmasked tokens aligned with CLIP-L/14.

    python -m invideo_jax.train --config=configs/umt/umt_l.py --workdir=DIR \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.aligned.teachers.clip.source=DIR_OF_CLIP

After the colon: `smoke`, with a small random teacher on the built-in data. CLIP's patches are of 14 pixels: it sees the clip
at 196 pixels, where its grid is that of the student.

Hardware and hours: published on 32 A100 (batch 64 each), for 200 epochs; not run at full size by this project.
Published result: Kinetics-400 90.3 % after fine-tuning (first on K710).

Source: UMT (arXiv:2303.16058) 3.2 and appendix; OpenGVLab/unmasked_teacher single_modality.
"""

from configs import common
from configs.umt import umt_b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = umt_b.get_config()
    c.model.size = "L"
    c.model.drop_path = 0.2
    c.stages.aligned.teachers.clip.size = "L"
    c.stages.aligned.teachers.clip.image_size = 196
    return common.smoke(c) if words["smoke"] else c
