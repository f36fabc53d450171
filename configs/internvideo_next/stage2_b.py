"""InternVideo-Next, stage 2, ViT-B/14: 32 frames at 224 px, latents of a frozen encoder at two kinds of masks.

    python -m invideo_jax.train --config=configs/internvideo_next/stage2_b.py \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.latent.teacher.source=STAGE1 --workdir=DIR

STAGE1 is a workdir, or a folder of weights, of the encoder of stage 1, from which the student is best
started as well. After the colon: `ema` (the targets come from the moving average of the student
with V-JEPA 2's momentum, L1 loss and no STAGE1), and `smoke`.

Published: frames and masks (8 rectangles of 0.15 and 2 of 0.7 of the frame; at most 400 tokens seen for
each 8 frames, all the others predicted), the frozen target (momentum 1), cosine loss, AdamW, rate, batch,
epochs, drop path, clipping. This project's own: the encoder is InternVideo2's (one class token instead of
four, no norm around the patch projection, no rotary positions), the predictor has the size of V-JEPA 2's
instead of 5 layers of ModernBERT; each mask hides an exact number of places; its rectangles have one shape for
each clip, where the published ones have one for each batch; of the tokens left, those seen are drawn at random, where the
published ones are the first in t-major order, of the early frames; each of the two views has a mask token of its own instead
of one for both; and the loss is the mean of the two views, not their sum. The targets are the last block's
patch tokens without a LayerNorm, as published (target.normalise).

Hardware and hours: published for 128 GPUs, 14 clips each, hours not published; not run at full size by
this project.

Source: InternVideo-Next (arXiv:2512.01342); OpenGVLab/InternVideo InternVideo-Next/exp/base/pretrain/stage2.sh,
engines/engine_for_stage2.py, engines/jepa_mask.py.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "ema", "smoke")
    c = common.latent()
    c.model.drop_path = 0.1
    stage = c.stages.latent
    stage.length = "101 epochs"
    stage.batch_size = 128 * 14
    stage.clip.frames = 32
    stage.clip.sampling = "segments"
    for mask in stage.views.values():
        mask.context = 400 * 32 // 8
        mask.predict_rest = True
    stage.optimizer.learning_rate = 1e-4
    stage.optimizer.b2 = 0.98
    stage.optimizer.eps = 1e-6
    stage.optimizer.clip_norm = 5.0
    stage.schedule.warmup = "0 epochs"
    if not words["ema"]:
        stage.target.loss = "cosine"
        stage.ema_decay = 0.0
        stage.teacher.source = "stage1"
    return common.smoke(c) if words["smoke"] else c
