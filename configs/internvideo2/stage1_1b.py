"""InternVideo2 stage 1, 1B: unmasked tokens aligned with InternVL-6B and VideoMAE V2-g.

    python -m invideo_jax.train --config=configs/internvideo2/stage1_1b.py --workdir=DIR \
        --config.data.train=FOLDER_OR_MANIFEST \
        --config.stages.aligned.teachers.clip.source=DIR_OF_INTERNVL \
        --config.stages.aligned.teachers.mae.source=DIR_OF_VIDEOMAE

The teachers' folders come from their published files (docs/distillation.md):

    python -m invideo_jax.interop.from_torch --layout=internvl_vision --input=internvl_c_13b_224px.pth --output=DIR
    python -m invideo_jax.interop.from_torch --layout=videomae_encoder --input=vit_g_hybrid_1200e_pre.pth --output=DIR

After the colon: `smoke`, with small random teachers on the built-in data.

Hardware and hours: published on 128 A100 (batch 32 each), for 300 epochs of K-Mash-1.1M; hours not published; not run at
full size by this project.
Published result: Kinetics-400 91.3 % after fine-tuning, 8 frames (91.6 % with 16).

Differences from the released script: frames are drawn one in each of 16 equal parts of the video (the released loader reads
frame k - 1 for k, and for k = 0 the last one); attention masks are drawn by Gumbel top-k, which has the same distribution.

Sources: InternVideo2 (arXiv:2403.15377) 3.1; OpenGVLab/InternVideo
InternVideo2/single_modality/scripts/pretraining/1B_pt.sh.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = common.aligned()
    c.model.size = "1B"
    c.model.drop_path = 0.25
    c.model.remat = "full"  # all 40 blocks
    stage = c.stages.aligned
    stage.batch_size = 128 * 32
    c.checkpoint.every = "20 epochs"
    return common.smoke(c) if words["smoke"] else c
