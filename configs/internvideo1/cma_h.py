"""Cross-model attention between VideoMAE ViT-H/16 and UniFormerV2-L/14, both frozen, on Kinetics-400.

    python -m invideo_jax.train --config=configs/internvideo1/cma_h.py --config.data.train=FOLDER_OR_MANIFEST \
        '--config.stages.fused.init.source=masked=DIR;multimodal=DIR' --workdir=DIR

After the colon: `r1` and `smoke`; the DIRs, and what is published and what is not, as in cma_b.py.

Hardware and hours: not published; not run at full size by this project.
Published result: InternVideo's Kinetics-400 91.1 % (an ensemble).

Source: InternVideo (arXiv:2212.03191) 3.3; its code is not published.
"""

from configs import common
from configs.internvideo1 import cma_b


def get_config(arg=None):
    words = common.parse_arg(arg, "r1", "smoke")
    c = cma_b.get_config("r1" if words["r1"] else None)
    c.model.size = "H"
    c.model.remat = "full"
    c.stages.fused.multimodal.size = "L"
    return common.smoke(c) if words["smoke"] else c
