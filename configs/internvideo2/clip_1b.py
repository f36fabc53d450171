"""InternVideo2-CLIP, 1B: the encoder of stage 2 in the space of InternVL-C's LLaMA.

    python -m invideo_jax.train --config=configs/internvideo2/clip_1b.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=LLAMA_FOLDER \
        --config.stages.contrastive.init.source='stage2=STAGE2;text=INTERNVL_TEXT'

STAGE2 is the workdir of `stage2_1b.py` or the folder of imported weights, INTERNVL_TEXT the folder that
`python -m invideo_jax.interop.from_torch` made of the texts' part of internvl_c_13b_224px.pth (docs/text_towers.md).
Both towers are frozen; the encoder's attention pool and the temperature are trained. After the colon: `smoke`.

Hardware and hours: published on 16 A100, 256 videos and 256 images each; hours not published; not run at full size by
this project.
Published result: MSR-VTT zero-shot R@1 50.0 text to video, 48.4 video to text.

Difference from the released script: as `stage2_1b.py` has.

Sources: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo
InternVideo2/multi_modality/scripts/pretraining/clip/1B/config.py.
"""

from configs import common


def recipe(size, words, *, gpu_rows, epochs, warmup, drop_path):
    """The recipe of one size; that of 6B calls it."""
    c = common.contrastive(common.two_towers())
    c.model.size = size
    c.model.layer_scale = 0.1
    c.model.drop_path = drop_path
    stage = c.stages.contrastive
    stage.length = f"{epochs} epochs"
    stage.schedule.warmup = f"{warmup} epochs"
    stage.batch_size = 16 * gpu_rows
    common.llama_words(stage)
    stage.text_tower.name = "llama"
    stage.text_tower.size = "7B"
    stage.init.fresh = (r"^temperature$",)
    stage.init.old_frames = 4
    common.take_encoder(stage, "stage2")
    return common.smoke(c) if words["smoke"] else c


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    return recipe("1B", words, gpu_rows=256, epochs=3, warmup=0.6, drop_path=0.3)
