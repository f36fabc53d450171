"""VideoMAE ViT-g/14, 16 frames at 224 px, tube mask 0.9: the sizes of VideoMAE V2.

    python -m invideo_jax.train --config=configs/internvideo1/mae_vit_g.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `smoke`.

The encoder (1408 wide, 40 blocks) and decoder (512 wide, 4 blocks) of VideoMAE V2, trained by VideoMAE's
objective with the settings of ViT-H; VideoMAE V2 also hides tokens from the decoder, which this
recipe does not.

Hardware and hours: VideoMAE V2 took more than two weeks on 64 A100 (arXiv:2303.16727, 1.35 M videos,
1200 epochs); not run at full size by this project.

Source: sizes of VideoMAE V2 (arXiv:2303.16727); settings of MCG-NJU/VideoMAE scripts/ for ViT-H.
"""

from configs import common
from configs.internvideo1 import mae_vit_h


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = mae_vit_h.get_config()
    c.model.size = "g"
    return common.smoke(c) if words["smoke"] else c
