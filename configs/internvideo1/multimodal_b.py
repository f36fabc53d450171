"""InternVideo's multimodal branch, B/16: UniFormerV2 over CLIP and CLIP's text tower, by contrast.

    python -m invideo_jax.train --config=configs/internvideo1/multimodal_b.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=CLIP_FOLDER \
        --config.stages.contrastive.init.source='vision/encoder/backbone=CLIP_VISION;text=CLIP_TEXT'

The two folders come from `python -m invideo_jax.interop.from_torch` (docs/text_towers.md); the global blocks start
fresh. Each step is of videos or of images, in turn. The branch's second loss, captioning, has the weight 0 in the
released configs and belongs to the generative stage. After the colon: `smoke`.

Hardware and hours: published as 128 A100 for 12 days; not run at full size by this project.
Published result: of L, MSR-VTT zero-shot R@1 40.7 text to video, 39.6 video to text.

The script of this pretraining is not released. Published: towers, frames, image size, 400 k steps; rate, weight decay
and warm-up are those of the released ablations, in which the text tower is frozen. This project's own: both towers are
trained, the batch size, and the share of images.

Sources: InternVideo (arXiv:2212.03191) 3.2; OpenGVLab/InternVideo InternVideo1/Pretrain/Multi-Modalities-Pretraining.
"""

from configs import common


def recipe(size, words):
    """The recipe of one size; that of L calls it."""
    c = common.contrastive(common.two_towers())
    c.model.name = "uniformer_v2"
    c.model.size = size
    del c.model.layer_scale  # these blocks have none
    stage = c.stages.contrastive
    stage.length = "400000 steps"
    stage.schedule.warmup = "4000 steps"
    stage.batch_size = 128 * 16
    stage.normalisation = "clip"
    common.clip_words(stage)
    stage.text.normalise = ""
    stage.text_tower.name = "clip"
    stage.text_tower.size = size
    stage.shared.temperature = 0.07
    stage.shared.warmest = 1.0
    stage.shared.logarithmic = True
    stage.optimizer.learning_rate = 1e-5
    stage.schedule.final = 1e-7
    stage.optimizer.freeze = ()
    stage.init.fresh = (r"^logit_scale$", r"^vision/encoder/(?!backbone/)")
    return common.smoke(c) if words["smoke"] else c


def get_config(arg=None):
    return recipe("B", common.parse_arg(arg, "smoke"))
