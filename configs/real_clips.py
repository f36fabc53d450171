"""A few real clips, found by words: minutes on two CPU cores, beside the built-in dataset (docs/real_clips.md).

    python -m invideo_jax.train --config=configs/real_clips.py --workdir=runs/real \
        --config.data.train='synthetic:data/synthetic,0.75;data/clips/clips.jsonl,0.25' \
        --config.data.eval=data/clips/clips.jsonl

Both stages of the quickstart, shorter: pixels of hidden cubes; then video, text and sound. Videos and captions are aligned
by contrast and by matching, sound by contrast with its video and with what is said to be heard. Frames are spread over the
whole clip, and crops are random, for there are few clips. Before it, the tokenizer: `python -m invideo_jax.tokenizer`
with `--output=data/words.model --vocabulary=1000`.
After the colon: `smoke`, for seconds instead of minutes.
"""

from configs import common, quickstart


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = quickstart.get_config()
    masked, stage = c.stages.masked, c.stages.contrastive
    for part in (masked, stage):
        part.clip.sampling = "rand"
        part.clip.crop = "random_resized"
        part.clip.crop_scale = (0.6, 1.0)
    masked.length = "300 steps"
    stage.length = "250 steps"
    stage.batch_size = 64
    stage.mask.video = 0.5
    stage.text.tokenizer = "data/words.model"
    stage.text.vocabulary = 1000
    stage.text.length = 28
    stage.text.of.audio = "audio"
    stage.audio.name = "audio_vit"
    stage.audio.size = "Micro"
    stage.audio.seconds = 4.0
    stage.shared.fusion_width = 128
    stage.losses.update(vtc=1.0, vtm=1.0, atc=0.5, avc=0.5)
    stage.init.fresh = (*common.FRESH_IN_STAGE2, r"^(text|audio)/")
    c.evals.reconstruction.examples = 16
    c.evals.reconstruction.every = "50%"
    c.evals.retrieval.every = "50%"
    c.evals.retrieval.rerank = 8
    c.log.every = "25 steps"
    return common.smoke(c) if words["smoke"] else c
