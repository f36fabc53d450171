"""A stage of unmasked-token alignment with frozen teachers."""

import ml_collections

from configs.common.masked import masked_stage


def clip_teacher() -> ml_collections.ConfigDict:
    """The teacher of class token, patches, pooled feature and attention: InternVL-C's vision tower."""
    c = ml_collections.ConfigDict()
    c.name = "internvl"  # or 'internvideo2', 'clip'; '': no such teacher
    c.size = "6B"
    # A folder that `python -m invideo_jax.interop.from_torch` wrote, the workdir of a run, or 'random:SEED'.
    c.source = ""
    c.layers = 6  # blocks whose outputs are targets
    c.interval = 1.0  # distance of these blocks, from the last one backwards
    # 'imagenet', 'clip' or 'half': frames are normalised with these constants; '': with the teacher's own.
    # UMT's code gives CLIP the student's clip, so 'imagenet', although CLIP was trained with 'clip', its own.
    c.constants = ""
    c.image_size = 0  # pixels that frames are resized to for the teacher; 0: as they come
    c.old_frames = 0  # frames of the clips that the source was made for; 0: as many
    c.rename = ()  # 'pattern->replacement' on the source's parameter paths
    c.leftover = ()  # patterns of the source's parameters that the teacher has no use for
    return c


def mae_teacher() -> ml_collections.ConfigDict:
    """The teacher of patches alone: VideoMAE V2's ViT-g."""
    c = clip_teacher()
    c.name = "video_mae"
    c.size = "g"
    c.layers = 4
    # Published code of this teacher exchanges the axes of heads and tokens in attention: True does so too.
    c.faithful_attention = False
    return c


def aligned_stage() -> ml_collections.ConfigDict:
    """InternVideo2's first stage, with the values of the 1B model.

    Source: InternVideo2 (arXiv:2403.15377) 3.1 and appendix; single_modality/scripts/pretraining.
    """
    stage = masked_stage()
    stage.objective = "aligned"
    stage.length = "301 epochs"  # one more than announced, so that the last one is saved
    stage.batch_size = 4096
    stage.clip.sampling = "segments"
    stage.clip.frames = 16  # what the mae teacher sees; the student sees every `stride`-th of them
    stage.mask = ml_collections.ConfigDict(dict(name="attention", ratio=0.8, per_frame=True))

    stage.target = ml_collections.ConfigDict()
    stage.target.clip_middle = 1.0  # factors of the three losses; 0 leaves one out
    stage.target.clip_final = 1.0
    stage.target.mae = 1.0

    stage.teachers = ml_collections.ConfigDict()
    stage.teachers.clip = clip_teacher()
    stage.teachers.mae = mae_teacher()
    stage.teachers.stride = 2
    # A folder that `python -m invideo_jax.teacher_cache` wrote, to read features instead of computing them.
    stage.teachers.cache = ""

    stage.student = ml_collections.ConfigDict()
    stage.student.mlp = False  # heads of the clip branch: Linear, or Linear, GELU, Linear
    stage.student.interval = 1.0  # distance of the blocks that predict, from the last one backwards

    stage.optimizer.b2 = 0.98
    stage.optimizer.eps = 1e-6
    stage.optimizer.clip_norm = 3.0
    return stage


def smoke_teacher(teacher: ml_collections.ConfigDict) -> None:
    """A small teacher with random weights."""
    teacher.size = "Micro"
    teacher.source = "random:0"
    teacher.layers = 2
    teacher.interval = 1.0
    teacher.image_size = 0
    teacher.old_frames = 0
