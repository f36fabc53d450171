"""VideoMAE V2 ViT-B/16, 16 frames at 224 px: tube mask 0.9 on the encoder, running cells 0.5 on the decoder.

    python -m invideo_jax.train --config=configs/internvideo1/mae_v2_b.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `smoke`.

The decoder sees the visible tokens and half of the hidden places, over which the loss is taken: about
half of the decoder's work is spared.

Hardware and hours: not published for ViT-B; not run at full size by this project.

Source: VideoMAE V2 (arXiv:2303.16727) 3.2, OpenGVLab/VideoMAEv2 scripts/pretrain. Batch and number of
epochs are those of VideoMAE's ViT-B (MCG-NJU/VideoMAE scripts/): the script of a V2 ViT-B is not published.
"""

from configs import common
from configs.internvideo1 import mae_vit_b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = mae_vit_b.get_config()
    mask = c.stages.masked.target.decoder_mask
    mask.name = "running_cell"
    mask.ratio = 0.5
    return common.smoke(c) if words["smoke"] else c
