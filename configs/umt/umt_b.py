"""UMT stage 1, ViT-B/16: unmasked tokens aligned with CLIP-B/16.

    python -m invideo_jax.train --config=configs/umt/umt_b.py --workdir=DIR \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.aligned.teachers.clip.source=DIR_OF_CLIP

After the colon: `smoke`, with a small random teacher on the built-in data. The teacher's folder comes from CLIP's own weights
(docs/distillation.md).

Published code gives CLIP the student's clip, normalised with ImageNet's constants; here CLIP's own are the default, and
--config.stages.aligned.teachers.clip.constants=imagenet does as published.

Hardware and hours: published on 32 A100 (batch 64 each), for 200 epochs; not run at full size by this project.
Published result: Kinetics-400 87.4 % after fine-tuning (first on K710).

Source: UMT (arXiv:2303.16058) 3.2 and appendix; OpenGVLab/unmasked_teacher single_modality.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = common.aligned()
    c.model.name = "video_mae"
    c.model.size = "B"
    c.model.layer_scale = 0.0
    c.model.drop_path = 0.1
    stage = c.stages.aligned
    stage.length = "201 epochs"  # one more than announced, so that the last one is saved
    stage.batch_size = 32 * 64
    stage.clip.frames = 8
    stage.target.clip_final = 0.0
    stage.target.mae = 0.0
    teachers = stage.teachers
    teachers.stride = 1
    teachers.mae.name = ""
    teachers.clip.name = "clip"
    teachers.clip.size = "B"
    stage.optimizer.b2 = 0.95
    stage.optimizer.eps = 1e-8
    stage.optimizer.clip_norm = 0.0
    c.checkpoint.every = "20 epochs"
    return common.smoke(c) if words["smoke"] else c
