"""VideoMAE ViT-H/16 fine-tuned for action recognition, 16 frames at 224 px.

    python -m invideo_jax.train --config=configs/internvideo1/finetune_vit_h.py --workdir=DIR \
        --config.data.train=MANIFEST --config.stages.finetune.init.source=DIR_OF_PRETRAINING

After the colon: `kinetics400` (default, VideoMAE's values); InternVideo's own, on 32 GPUs: `internvideo1` (K400), `k710`, `ssv2`,
and from the K710 run `k710_k400` and `k710_k700`; and `smoke`. The last one needs `init.label_map` (see
`configs/internvideo2/finetune_1b.py`).

Hardware and hours: published on 64 V100 (InternVideo's on 32 GPUs); not run at full size by this project.
Published result, top-1: Kinetics-400 86.6 (Kinetics-400 pretraining).

Differences from the released scripts: none known in values. InternVideo's warm up from a rate of 1e-8, VideoMAE's from 1e-6.
Where a video gives two clips, its frames are drawn once there, and the augmentation alone differs; here each clip draws its own.

Sources: MCG-NJU/VideoMAE scripts/, FINETUNE.md; OpenGVLab/InternVideo InternVideo1/Pretrain/VideoMAE/scripts/finetune/.
"""

from configs import common
from configs.common.classify import from_classes
from configs.internvideo1.finetune_vit_b import put_data, videomae

_INTERNVIDEO1 = dict(rows=4, layer_decay=0.8, drop_path=0.2, dropout=0.5, views=(7, 3))
DATA = {
    "kinetics400": (
        "kinetics400",
        dict(gpus=64, rows=8, epochs=50, warmup=5, rate=1e-3, layer_decay=0.75, drop_path=0.2)
        | dict(dropout=0.5, views=(5, 3)),
    ),
    "internvideo1": ("kinetics400", dict(_INTERNVIDEO1, gpus=32, epochs=35, warmup=5, rate=1e-3)),
    "k710": ("k710", dict(_INTERNVIDEO1, gpus=32, epochs=40, warmup=5, rate=1e-3)),
    "k710_k400": ("kinetics400", dict(_INTERNVIDEO1, gpus=8, epochs=3, warmup=1, rate=2e-6)),
    "k710_k700": ("kinetics700", dict(_INTERNVIDEO1, gpus=8, epochs=3, warmup=1, rate=2e-6)),
    "ssv2": (
        "ssv2",
        dict(_INTERNVIDEO1, gpus=32, epochs=30, warmup=5, rate=5e-4)
        | dict(rows=8, repeats=1, dropout=0.3, views=(2, 3)),
    ),
}


def get_config(arg=None):
    words = common.parse_arg(
        arg, "kinetics400", "internvideo1", "k710", "k710_k400", "k710_k700", "ssv2", "smoke"
    )
    name = next((name for name in DATA if words[name]), "kinetics400")
    c = videomae("H")
    c.model.remat = "full"
    put_data(c, *DATA[name])
    stage = c.stages.finetune
    if name.startswith("k710_"):
        stage.init.fresh, stage.init.leftover = (), ()
        from_classes(stage, name.removeprefix("k710_"))
    if name not in ("kinetics400", "ssv2"):
        stage.schedule.warmup_start = 1e-8
    return common.smoke(c) if words["smoke"] else c
