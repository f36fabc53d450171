"""Cross-model attention between VideoMAE ViT-B/16 and UniFormerV2-B/16, both frozen, on Kinetics-400.

    python -m invideo_jax.train --config=configs/internvideo1/cma_b.py --config.data.train=FOLDER_OR_MANIFEST \
        '--config.stages.fused.init.source=masked=DIR;multimodal=DIR' --workdir=DIR

The two DIRs are workdirs (or folders of imported weights) of the encoders, each fine-tuned on labels: of
`finetune_vit_b.py` and `uniformerv2_b.py`; modules and heads start fresh. After the colon: `r1` (the other reading of which encoder
asks which), and `smoke`.

Published: both encoders are frozen but for the query token of the multimodal one; a module is an attention
of one encoder's tokens to the other's and an MLP; the scores of both branches are combined linearly, with
learned factors. This project's own: all numbers (4 modules, 16 heads, places, rate, batch, epochs), zeros
at the start of each module, and no mixing of clips.

Hardware and hours: not published; not run at full size by this project.

Source: InternVideo (arXiv:2212.03191) 3.3; its code is not published.
"""

from configs import common
from configs.common.fusion import fusion_stage


def get_config(arg=None):
    words = common.parse_arg(arg, "r1", "smoke")
    c = common.classifier("video_mae")
    c.model.size = "B"
    del c.stages.finetune
    stage = c.stages.fused = fusion_stage()
    c.stage_order = ("fused",)
    stage.init.rename = ("^masked/encoder/->masked/", "^multimodal/encoder/->multimodal/")
    stage.init.leftover = (r"^(masked|multimodal)/(fc_norm|head)/",)
    stage.init.fresh = (r"^(exchanges_\d+|masked_head|multimodal_head|combination)(/|$)",)
    if words["r1"]:
        stage.fusion.reading = "R1"
    return common.smoke(c) if words["smoke"] else c
