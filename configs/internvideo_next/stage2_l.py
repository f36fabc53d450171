"""InternVideo-Next, stage 2, ViT-L/14: 32 frames at 224 px, latents of a frozen encoder at two kinds of masks.

    python -m invideo_jax.train --config=configs/internvideo_next/stage2_l.py \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.latent.teacher.source=STAGE1 --workdir=DIR

After the colon: `ema` and `smoke`; what is published and what is not as in stage2_b.py.

Hardware and hours: published for 128 GPUs, 8 clips each, hours not published; not run at full size by
this project.

Source: InternVideo-Next (arXiv:2512.01342); OpenGVLab/InternVideo InternVideo-Next/exp/large/pretrain/stage2.sh.
"""

from configs import common
from configs.internvideo_next import stage2_b


def get_config(arg=None):
    words = common.parse_arg(arg, "ema", "smoke")
    c = stage2_b.get_config("ema" if words["ema"] else None)
    c.model.size = "L"
    c.model.drop_path = 0.2
    c.model.remat = "full"
    c.stages.latent.batch_size = 128 * 8
    return common.smoke(c) if words["smoke"] else c
