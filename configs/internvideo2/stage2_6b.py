"""InternVideo2 stage 2, 6B: video, images, sound and text aligned; BEATs is the frozen tower of sound.

    python -m invideo_jax.train --config=configs/internvideo2/stage2_6b.py --workdir=DIR \
        --config.data.train='VIDEOS.json,0.5;IMAGES.json,0.5' \
        --config.stages.contrastive.text.tokenizer=BERT_FOLDER \
        --config.stages.contrastive.init.source='vision=STAGE1;text=BERT_WEIGHTS;audio=BEATS'

STAGE1 is the workdir of `stage1_6b.py` or the folder of imported weights; BERT_WEIGHTS and BEATS are folders that
`python -m invideo_jax.interop.from_torch` made of bert-large-uncased and of a BEATs checkpoint (docs/text_towers.md).
Texts are the fused captions of what is seen, heard and said, and where there is none the caption of the video. Losses
with sound are over the examples that have some; nothing stands in for it. After the colon: `unmasked`, the step after
it with every token visible, the vision encoder frozen, and sound also paired with its own captions (paper; no script
was released, so that its length and the losses of sound with text are this project's own); and `smoke`, with small
towers on the built-in data.

Hardware and hours: published on 256 A100, 64 examples of each kind on each; hours not published; not run at full size
by this project.
Published result: MSR-VTT zero-shot R@1 55.9 text to video, 53.7 video to text (8 frames).

Differences from the released script: those of `stage2_1b.py`; and the released loader of sound does not run, so that
the windows of sound are this project's own (docs/audio.md).

Sources: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo
InternVideo2/multi_modality/scripts/pretraining/stage2/6B/config.py.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "unmasked", "smoke")
    c = common.contrastive()
    c.model.size = "6B"
    c.model.drop_path = 0.3
    c.model.remat = "full"
    stage = c.stages.contrastive
    stage.length = "5 epochs"
    stage.batch_size = 256 * 64
    stage.text.length = 40
    stage.text.of.video = "fused|video"
    stage.text.of.audio_video = "fused|video"
    stage.audio.name = "beats"
    stage.audio.size = "B"
    stage.shared.width = 768
    stage.shared.fusion_width = 768
    stage.losses.avtc = 1.0
    stage.losses.avtm = 1.0
    stage.losses.avmlm = 1.0
    stage.optimizer.freeze = (r"^audio/",)
    stage.init.fresh = common.FRESH_IN_STAGE2
    common.take_encoder(stage)
    if words["unmasked"]:
        common.unmasked(stage)
        stage.optimizer.freeze = (r"^vision/",)
        stage.text.of.audio = "audio"
        stage.losses.atc = 1.0
        stage.losses.atm = 1.0
        stage.losses.amlm = 1.0
        stage.init.fresh = (r"^audio_match_head/",)
    return common.smoke(c) if words["smoke"] else c
