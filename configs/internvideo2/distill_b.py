"""InternVideo2-B/14 distilled from the stage-2 model of 1B.

    python -m invideo_jax.train --config=configs/internvideo2/distill_b.py --workdir=DIR \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.aligned.teachers.clip.source=DIR_OF_1B

The teacher's folder comes from the published file (docs/distillation.md); it was trained on 4 frames, and its table of
positions is interpolated to the 8 of this recipe.

After the colon: `smoke`, with a small random teacher on the built-in data.

Hardware and hours: published on 32 GPUs (batch 128 each), for 100 epochs of K-Mash-1.1M; hours not published; not run at
full size by this project.
Published result: Kinetics-400 88.4 % after fine-tuning.

Differences from the released script: none known in values. Its teacher loader imports a function that is not there, and its
script for L names the small model.

Source: OpenGVLab/InternVideo InternVideo2/single_modality/scripts/distillation/, internvideo2_distill.py.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = common.aligned()
    c.model.size = "B"
    c.model.drop_path = 0.05
    stage = c.stages.aligned
    stage.length = "101 epochs"  # one more than announced, so that the last one is saved
    stage.batch_size = 32 * 128
    stage.clip.frames = 8
    stage.mask.per_frame = False  # the draw is over the whole clip
    stage.target.mae = 0.0
    stage.student.mlp = True
    teachers = stage.teachers
    teachers.stride = 1
    teachers.mae.name = ""
    teachers.clip.name = "internvideo2"
    teachers.clip.size = "1B"
    teachers.clip.interval = 3.34  # blocks 23, 26, 29, 33, 36, 39
    teachers.clip.old_frames = 4
    stage.optimizer.learning_rate = 1e-3
    stage.optimizer.clip_norm = 5.0
    stage.schedule.warmup = "20 epochs"
    c.checkpoint.every = "20 epochs"
    return common.smoke(c) if words["smoke"] else c
