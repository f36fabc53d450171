"""Linear probe of InternVideo2-6B: encoder and attention pool are frozen, norm and head are trained.

    python -m invideo_jax.train --config=configs/internvideo2/linear_probe_6b.py:k400 --workdir=DIR \
        --config.data.train=MANIFEST --config.stages.finetune.init.source=DIR_OF_STAGE1

After the colon: the data set, `k400` (default), `ssv2`, `ucf101` or `hmdb51`, and `smoke`; it starts from stage 1 or
2. SSv2 has the class token, the mean of each
frame and the pooled feature side by side.

Hardware and hours: published on 16 GPUs (64 videos each), 8 for UCF101 and HMDB51; hours not published; not run at full size
by this project.
Published result, top-1: K400 82.0, SSv2 47.8, UCF101 96.3, HMDB51 71.8; from stage 2: 84.2, 56.7, 97.3, 80.7.

Differences from the released scripts: those of K400 name a missing script (`run_linear_probing4_2.py`, one of the two) and an
undefined model (`vit_6B_patch14_224`); this one is 6B with their other values. From stage 2, the
script of UCF101 has no dropout: `--config.stages.finetune.head.dropout=0`.

Sources: InternVideo2 (arXiv:2403.15377) appendix; OpenGVLab/InternVideo
InternVideo2/single_modality/scripts/finetuning/linear_probing/.
"""

from configs import common
from configs.common.classify import NEW_CAT_HEAD, POOL, TRUNK, from_pretraining, put

_SMALL = dict(gpus=8, epochs=20, views=(2, 1), final=0.0)
DATA = {
    "k400": dict(gpus=16, epochs=9, warmup=2, rate=5e-4, final=0.0),
    "ssv2": dict(gpus=16, epochs=20, warmup=4, rate=1e-4, final=0.0),
    "ucf101": dict(_SMALL, rate=1e-3, dropout=0.5),
    "hmdb51": dict(_SMALL, rate=2e-3, dropout=0.3),
}


def get_config(arg=None):
    words = common.parse_arg(arg, "k400", "ssv2", "ucf101", "hmdb51", "smoke")
    data = next((name for name in DATA if words[name]), "k400")
    c = common.classifier("internvideo2")
    c.model.size = "6B"
    put(c, data=data, rows=64, repeats=1, weight_decay=0.0, **({"views": (1, 3)} | DATA[data]))
    stage = c.stages.finetune
    stage.clip.frames = 16
    stage.clip.randaugment = "rand-m5-n2-mstd0.25-inc1"
    stage.optimizer.freeze = (TRUNK, POOL)
    from_pretraining(stage)
    if data == "ssv2":
        stage.head.variant = "cat"
        stage.head.merge = "cls_avgN_proj"
        stage.head.merge_norm = "LN"
        stage.init.fresh = NEW_CAT_HEAD
    if data == "ucf101":
        stage.clip.sampling = "window"  # 16 frames, 4 apart
    return common.smoke(c) if words["smoke"] else c
