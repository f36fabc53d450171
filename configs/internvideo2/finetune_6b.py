"""InternVideo2-6B fine-tuned for action recognition.

    python -m invideo_jax.train --config=configs/internvideo2/finetune_6b.py:k710 --workdir=DIR \
        --config.data.train=MANIFEST --config.stages.finetune.init.source=DIR_OF_STAGE1

After the colon: the data set, `k710` (default), `k400`, `k600`, `k700`, `mit`, `mit336` (from the MiT run, at 336 pixels),
`ssv1` or `ssv2`; `f16` for 16 frames instead of 8; and `smoke`. Where each starts from: see `finetune_1b.py`.

Hardware and hours: published on 64 GPUs (4 videos each, 2 clips of each video); hours not published; not run at full size by
this project.
Published result, top-1: K710 88.1, K400 91.9 (92.1 with 16 frames), K600 91.7 (91.9), K700 85.7 (85.9), SSv1 69.7,
SSv2 77.5 (77.4), MiT 51.0 (51.2 at 336 pixels). Stage 1 of 6B was never published.

Differences from the released scripts: `--head_drop_path` is left out, which changes nothing in the released model. The frames
of a video are drawn once there for both of its clips, whose augmentation alone differs; here each clip draws its own.

Sources: InternVideo2 (arXiv:2403.15377) appendix; OpenGVLab/InternVideo
InternVideo2/single_modality/scripts/finetuning/full_tuning/.
"""

from configs import common
from configs.common.classify import from_classes, from_pretraining, put

# data set; epochs, warm-up epochs, base rate, final rate, drop path, clips of each video, (clips, crops) of the test
DATA = {
    "k710": ("k710", 6, 1, 2.5e-5, 0.0, 0.35, 2, (4, 3)),
    "k400": ("k400", 1, 0, 1e-5, 1e-6, 0.35, 2, (4, 3)),
    "k600": ("k600", 1, 0, 1e-5, 1e-6, 0.35, 2, (4, 3)),
    "k700": ("k700", 1, 0, 1e-5, 1e-6, 0.35, 2, (4, 3)),
    "mit": ("mit", 8, 2, 2.5e-5, 0.0, 0.35, 1, (4, 3)),
    "mit336": ("mit", 2, 0, 1e-5, 0.0, 0.4, 1, (4, 3)),
    "ssv1": ("ssv1", 7, 2, 7.5e-5, 0.0, 0.4, 2, (4, 3)),
    "ssv2": ("ssv2", 6, 2, 7.5e-5, 0.0, 0.4, 2, (5, 3)),
}


def get_config(arg=None):
    words = common.parse_arg(
        arg, "k710", "k400", "k600", "k700", "mit", "mit336", "ssv1", "ssv2", "f16", "smoke"
    )
    name = next((name for name in DATA if words[name]), "k710")
    c = common.classifier("internvideo2")
    c.model.size = "6B"
    c.model.remat = "full"
    data, epochs, warmup, rate, final, drop_path, repeats, views = DATA[name]
    put(
        c,
        data=data,
        gpus=64,
        rows=4,
        epochs=epochs,
        warmup=warmup,
        rate=rate,
        final=final,
        layer_decay=0.915,
        drop_path=drop_path,
        repeats=repeats,
        weight_decay=0.1 if name == "mit336" else 0.05,
        views=views,
    )
    stage = c.stages.finetune
    if data in ("k710", "ssv1", "ssv2"):
        from_pretraining(stage)
    elif name == "mit336":
        stage.clip.size = 336
    else:
        from_classes(stage, data, old="k400" if data == "mit" else "k710")
    if words["f16"]:
        stage.clip.frames = 16
    return common.smoke(c) if words["smoke"] else c
