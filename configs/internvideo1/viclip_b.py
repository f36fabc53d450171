"""ViCLIP-B/16: CLIP over video with joint attention in space and time, on a tenth of the tokens.

    python -m invideo_jax.train --config=configs/internvideo1/viclip_b.py --workdir=DIR \
        --config.data.train=VIDEOS.json --config.stages.contrastive.text.tokenizer=CLIP_FOLDER \
        --config.stages.contrastive.init.source='vision/encoder=CLIP_VISION;text=CLIP_TEXT'

The two folders come from `python -m invideo_jax.interop.from_torch` (docs/text_towers.md). The text tower is frozen.
After the colon: `unmasked`, the end of the training with every token visible (its length is this project's own), and
`smoke`.

Hardware and hours: published with 512 videos on each GPU for 10 epochs of InternVid-10M-FLT; the number of GPUs and
the hours are not published (8 here is this project's own); not run at full size by this project.
Published result: of ViCLIP-L, MSR-VTT zero-shot R@1 42.4 text to video, 41.3 video to text.

Sources: InternVid (arXiv:2307.06942) 4; OpenGVLab/InternVideo InternVideo1/Pretrain/ViCLIP.
"""

from configs import common


def recipe(size, words, *, rate):
    """The recipe of one size; that of L calls it."""
    c = common.contrastive(common.two_towers())
    c.model.name = "viclip"
    c.model.size = size
    del c.model.layer_scale  # these blocks have none
    stage = c.stages.contrastive
    stage.length = "10 epochs"
    stage.schedule.warmup = "0.5 epochs"
    stage.batch_size = 8 * 512
    stage.normalisation = "clip"
    stage.mask.video = 0.9
    stage.mask.image = 0.5
    common.clip_words(stage)
    stage.text_tower.name = "clip"
    stage.text_tower.size = size
    stage.optimizer.learning_rate = rate
    stage.schedule.final = 0.01 * rate
    stage.optimizer.freeze = (r"^text/",)
    stage.init.fresh = (r"^temperature$", r"time_embedding|temporal")
    if words["unmasked"]:
        stage.mask.video = stage.mask.image = 0.0
        stage.length = "0.5 epochs"
        stage.schedule.warmup = "0.1 epochs"
        stage.init.fresh = ()
    return common.smoke(c) if words["smoke"] else c


def get_config(arg=None):
    words = common.parse_arg(arg, "unmasked", "smoke")
    return recipe("B", words, rate=2e-4)
