"""InternVideo2-S/14, distilled, fine-tuned for action recognition.

    python -m invideo_jax.train --config=configs/internvideo2/finetune_s.py:k710 --workdir=DIR \
        --config.data.train=MANIFEST --config.stages.finetune.init.source=DIR_OF_DISTILLATION

After the colon: the data set, `k710` (default), `k400`, `k600`, `k700` or `ssv2`, and `smoke`. K710 and SSv2 start from
`distill_s.py` or the published file, the others from the K710 run; K600 and K700 need `init.label_map` (see `finetune_1b.py`).

Hardware and hours: published on 8 GPUs (32 videos each, 2 clips of each video) for K710; hours not published; not run at
full size by this project.
Published result, top-1: K710 79.6, K400 85.4, K600 86.0, K700 75.7, SSv2 71.6.

Differences from the released scripts: the frames of a video are drawn once there for both of its clips, whose augmentation alone
differs; here each clip draws its own.

Sources: InternVideo2 (arXiv:2403.15377) appendix; OpenGVLab/InternVideo
InternVideo2/single_modality/scripts/finetuning/full_tuning/.
"""

from configs import common
from configs.common.classify import from_classes, from_pretraining, put

_REST = dict(gpus=32, rows=32, epochs=5, warmup=1, rate=2e-5, layer_decay=0.75, drop_path=0.1)
DATA = {
    "k710": dict(gpus=8, rows=32, epochs=35, warmup=5, rate=2e-4, layer_decay=0.75, drop_path=0.1),
    "k400": _REST,
    "k600": _REST,
    "k700": _REST,
    "ssv2": dict(gpus=8, rows=32, epochs=30, warmup=5, rate=5e-4, layer_decay=0.75, drop_path=0.1),
}


def get_config(arg=None):
    words = common.parse_arg(arg, "k710", "k400", "k600", "k700", "ssv2", "smoke")
    data = next((name for name in DATA if words[name]), "k710")
    c = common.classifier("internvideo2")
    c.model.size = "S"
    put(c, data=data, **DATA[data])
    if data in ("k710", "ssv2"):
        from_pretraining(c.stages.finetune)
    else:
        from_classes(c.stages.finetune, data)
    return common.smoke(c) if words["smoke"] else c
