"""VideoMAE ViT-L/16 fine-tuned for action recognition, 16 frames at 224 px.

    python -m invideo_jax.train --config=configs/internvideo1/finetune_vit_l.py --workdir=DIR \
        --config.data.train=MANIFEST --config.stages.finetune.init.source=DIR_OF_PRETRAINING

After the colon: `kinetics400` (default, VideoMAE's values), `internvideo1` (InternVideo's, of K400) or `kinetics700` (InternVideo's),
and `smoke`.

Hardware and hours: published on 64 V100 (InternVideo's on 32 GPUs); not run at full size by this project.
Published result, top-1: Kinetics-400 85.2.

Differences from the released scripts: where a video gives two clips, its frames are drawn once there, and the augmentation alone
differs; here each clip draws its own.

Sources: MCG-NJU/VideoMAE scripts/, FINETUNE.md; OpenGVLab/InternVideo InternVideo1/Pretrain/VideoMAE/scripts/finetune/.
"""

from configs import common
from configs.internvideo1.finetune_vit_b import put_data, videomae

VIDEOMAE = dict(gpus=64, rows=2, epochs=35, warmup=5, rate=2e-3, layer_decay=0.75, drop_path=0.1)
INTERNVIDEO1 = dict(gpus=32, rows=6, repeats=1, epochs=40, warmup=5, rate=2e-3)
INTERNVIDEO1 |= dict(layer_decay=0.75, drop_path=0.2)


def get_config(arg=None):
    words = common.parse_arg(arg, "kinetics400", "kinetics700", "internvideo1", "smoke")
    c = videomae("L")
    data = "kinetics700" if words["kinetics700"] else "kinetics400"
    values = INTERNVIDEO1 if words["internvideo1"] or words["kinetics700"] else VIDEOMAE
    put_data(c, data, values | dict(views=(5, 3)))
    return common.smoke(c) if words["smoke"] else c
