"""InternVideo2-S/14 distilled from the stage-2 model of 1B.

    python -m invideo_jax.train --config=configs/internvideo2/distill_s.py --workdir=DIR \
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.aligned.teachers.clip.source=DIR_OF_1B

After the colon: `smoke`, with a small random teacher on the built-in data. See `distill_b.py` for teacher and sources.

Hardware and hours: published on 32 GPUs (batch 128 each); not run at full size by this project.
Published result: Kinetics-400 85.4 % after fine-tuning.

Source: OpenGVLab/InternVideo InternVideo2/single_modality/scripts/distillation/.
"""

from configs import common
from configs.internvideo2 import distill_b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = distill_b.get_config()
    c.model.size = "S"
    c.stages.aligned.batch_size = 32 * 128
    return common.smoke(c) if words["smoke"] else c
