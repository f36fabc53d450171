"""InternVideo2-1B fine-tuned for action recognition.

    python -m invideo_jax.train --config=configs/internvideo2/finetune_1b.py:k710 --workdir=DIR \
        --config.data.train=MANIFEST --config.stages.finetune.init.source=DIR_OF_STAGE1

After the colon: the data set, `k710` (default), `k400`, `k600`, `k700`, `mit`, `ssv1` or `ssv2`; `f16` for 16 frames
instead of 8; and `smoke`. K710, SSv1 and SSv2 start from stage 1 (a workdir of `stage1_1b.py`, or the published file by
`interop.from_torch`), K400, K600 and K700 from the K710 run, MiT from the K400 run. K600 and K700 need
`--config.stages.finetune.init.label_map=FILE.json`: the number in K710 of each of their classes.

The final test, 4 clips x 3 crops of each video (SSv1 and SSv2: 2 x 3): `python -m invideo_jax.evaluate --workdir=DIR`.

Hardware and hours: published on 32 GPUs (8 videos each, 2 clips of each video); hours not published; not run at full size by
this project.
Published result, top-1: K710 87.6, K400 91.3 (91.6 with 16 frames), K600 91.4 (91.6), K700 85.0 (85.4), SSv1 68.5,
SSv2 77.1, MiT 50.8.

Differences from the released scripts: one draw of mixup serves the 16 clips that one GPU had, as there, whatever the
number of devices here is. The frames of a video are drawn once there for both of its clips, whose augmentation alone differs; here
each clip draws its own.

Sources: InternVideo2 (arXiv:2403.15377) appendix; OpenGVLab/InternVideo
InternVideo2/single_modality/scripts/finetuning/full_tuning/.
"""

from configs import common
from configs.common.classify import from_classes, from_pretraining, put

# epochs, warm-up epochs, base rate, layer-wise decay, clips of each video, (clips, crops) of the test
DATA = {
    "k710": (9, 2, 5e-5, 0.9, 2, (4, 3)),
    "k400": (3, 0, 1e-5, 0.9, 2, (4, 3)),
    "k600": (3, 0, 1e-5, 0.9, 2, (4, 3)),
    "k700": (3, 0, 1e-5, 0.9, 2, (4, 3)),
    "mit": (15, 5, 5e-5, 0.9, 1, (4, 3)),
    "ssv1": (9, 3, 1e-4, 0.915, 2, (2, 3)),
    "ssv2": (8, 3, 1e-4, 0.915, 2, (2, 3)),
}


def get_config(arg=None):
    words = common.parse_arg(
        arg, "k710", "k400", "k600", "k700", "mit", "ssv1", "ssv2", "f16", "smoke"
    )
    data = next((name for name in DATA if words[name]), "k710")
    c = common.classifier("internvideo2")
    c.model.size = "1B"
    c.model.remat = "full"
    epochs, warmup, rate, decay, repeats, views = DATA[data]
    put(
        c,
        data=data,
        gpus=32,
        rows=8,
        epochs=epochs,
        warmup=warmup,
        rate=rate,
        layer_decay=decay,
        drop_path=0.3,
        repeats=repeats,
        views=views,
    )
    stage = c.stages.finetune
    if data in ("k710", "ssv1", "ssv2"):
        from_pretraining(stage)
    else:
        from_classes(stage, data, old="k400" if data == "mit" else "k710")
    if words["f16"]:
        stage.clip.frames = 16
    return common.smoke(c) if words["smoke"] else c
