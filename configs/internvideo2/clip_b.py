"""InternVideo2-CLIP, B: a small video encoder in the space of MobileCLIP-B's texts.

    python -m invideo_jax.train --config=configs/internvideo2/clip_b.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=CLIP_FOLDER \
        --config.stages.contrastive.init.source='vision=K710;text=MOBILECLIP'

K710 is a folder with the encoder fine-tuned on K710 (`finetune_b.py`, or imported from the published file), MOBILECLIP
one that `python -m invideo_jax.interop.from_torch` made of MobileCLIP-B (docs/text_towers.md). Both towers are frozen;
the encoder's pool, the projection behind it and the temperature are trained. After the colon: `smoke`.

Hardware and hours: 256 videos and 256 images on each GPU; the number of GPUs and the hours are not published (16 is
that of the 1B model); not run at full size by this project.
Published result: MSR-VTT zero-shot R@1 40.3 text to video, 48.5 video to text.

Difference from the released script: as `stage2_1b.py` has.

Sources: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo
InternVideo2/multi_modality/scripts/pretraining/clip/B14/config.py.
"""

from configs import common


def recipe(size, words):
    """The recipe of one size; those of S and L call it."""
    c = common.contrastive(common.two_towers())
    c.model.size = size
    c.model.layer_scale = 0.1
    stage = c.stages.contrastive
    stage.length = "3 epochs"
    stage.schedule.warmup = "0.6 epochs"
    stage.batch_size = 16 * 256
    common.clip_words(stage)
    stage.text_tower.name = "mobileclip"
    stage.text_tower.size = "B"
    stage.shared.projection = "norm"
    stage.shared.width = 512
    stage.init.fresh = (r"^vision/align", r"^temperature$")
    common.take_encoder(stage)
    return common.smoke(c) if words["smoke"] else c


def get_config(arg=None):
    return recipe("B", common.parse_arg(arg, "smoke"))
