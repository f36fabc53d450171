"""UniFormerV2-L/14, 8 frames at 224 px: InternVideo's multimodal video tower, fine-tuned on action labels.

    python -m invideo_jax.train --config=configs/internvideo1/uniformerv2_l.py \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.finetune.init.source=TOWER --workdir=DIR

TOWER is a folder of weights of the video tower (`internvideo1_multimodal` is its layout), as it comes from
training with text; the head starts fresh. After the colon: `kinetics400` (default) or `k710`, and `smoke`.

Published: the tower (CLIP ViT-L/14 frame by frame, global blocks beside the last 4, dropout 0.5 in them),
frames and size, and that it is fine-tuned on K710 before features are exchanged with the masked encoder.
This project's own: rate, batch, epochs and augmentation.

Hardware and hours: not published; not run at full size by this project.

Source: InternVideo (arXiv:2212.03191) 3.2, 3.3; UniFormerV2 (arXiv:2211.09552).
"""

from configs import common
from configs.internvideo1 import uniformerv2_b


def get_config(arg=None):
    words = common.parse_arg(arg, "kinetics400", "k710", "smoke")
    c = uniformerv2_b.get_config("k710" if words["k710"] else None)
    c.model.size = "L"
    c.model.remat = "full"
    if words["smoke"]:
        c.stages.finetune.init.rename = ()
    return common.smoke(c) if words["smoke"] else c
