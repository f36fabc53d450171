"""InternVideo2 stage 2, 1B: video, images and text aligned by VTC, VTM and MLM on masked tokens.

    python -m invideo_jax.train --config=configs/internvideo2/stage2_1b.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=BERT_FOLDER \
        --config.stages.contrastive.init.source='vision=STAGE1;text=BERT_WEIGHTS'

STAGE1 is the workdir of `stage1_1b.py` or the folder of imported weights, BERT_WEIGHTS the folder that
`python -m invideo_jax.interop.from_torch` made of bert-large-uncased (docs/text_towers.md). Each step is of videos or of
images, in the proportion of their weights. After the colon: `unmasked`, the step after it with every token visible and
the vision encoder frozen (paper; no script was released, so that its length is this project's own); and `smoke`, with
small towers on the built-in data.

Hardware and hours: published on 64 A100, 64 videos and 64 images each; hours not published; not run at full size by
this project.
Published result: MSR-VTT zero-shot R@1 51.9 text to video, 50.9 video to text (8 frames).

Differences from the released script: the contrastive loss has its whole gradient (the released code divides it by the
number of processes: contrast.gradient_factor); examples of different corpora never count as the same
(contrast.positives); negatives of matching come from the whole batch, not from that of one GPU; steps of videos and of
images alternate evenly, where the released loader shuffles them.

Sources: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo
InternVideo2/multi_modality/scripts/pretraining/stage2/1B/config.py.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "unmasked", "smoke")
    c = common.contrastive()
    c.model.size = "1B"
    c.model.drop_path = 0.25
    c.model.remat = "full"
    stage = c.stages.contrastive
    stage.image_positions = "separate"
    stage.init.fresh = (*common.FRESH_IN_STAGE2, r"^vision/encoder/image_position")
    common.take_encoder(stage)
    if words["unmasked"]:
        common.unmasked(stage)
    return common.smoke(c) if words["smoke"] else c
