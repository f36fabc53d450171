"""A stage of latent prediction."""

import ml_collections

from configs.common.masked import masked_stage


def view(blocks: int, share: float, ratio: float) -> ml_collections.ConfigDict:
    """A multi-block mask: so many rectangles, each of this share of the frame.

    Args:
        ratio: share of the places hidden, exactly; published masks differ from example to example and
            average to it.
    """
    mask = ml_collections.ConfigDict()
    mask.name = "multi_block"
    mask.blocks = blocks
    mask.share = share
    mask.aspect = (0.75, 1.5)  # height over width
    mask.ratio = ratio
    mask.context = 0  # at most so many tokens are seen; 0: all that are not hidden
    mask.predict_rest = False  # whether those above that number are predicted as well
    return mask


def latent_stage() -> ml_collections.ConfigDict:
    """A stage of latent prediction with the masks, loss and targets of V-JEPA 2.

    The mean shares that 8 rectangles of 0.15 and 2 of 0.7 cover are measured: 0.62 and 0.81 on 16 x 16
    places, 0.63 and 0.82 on 14 x 14.

    Source: V-JEPA (arXiv:2404.08471) 3, V-JEPA 2 (arXiv:2506.09985) 2.1 and appendix.
    """
    stage = masked_stage()
    stage.objective = "latent"
    del stage.mask

    # Masks of the same clip; each has its own mask token in the predictor.
    stage.views = ml_collections.ConfigDict()
    stage.views.short = view(8, 0.15, 0.62)
    stage.views.long = view(2, 0.7, 0.81)

    stage.target = ml_collections.ConfigDict()
    stage.target.loss = "l1"  # or 'cosine'
    # Whether the targets are layer-normalised first: 'yes', 'no', or 'auto': with l1 (V-JEPA), not with
    # cosine (InternVideo-Next).
    stage.target.normalise = "auto"

    stage.predictor = ml_collections.ConfigDict()
    stage.predictor.width = 384
    stage.predictor.depth = 12
    stage.predictor.heads = 12
    stage.predictor.mlp_width = 1536

    # The targets' encoder is the moving average of the trained one,
    stage.ema_decay = 0.99925
    stage.ema_final = 0.99925  # its decay at the end of the stage; linear from one to the other
    # or, with ema_decay=0, frozen: a folder of weights, the workdir of a run, or 'random:SEED'.
    stage.teacher = ml_collections.ConfigDict()
    stage.teacher.source = ""
    stage.teacher.old_frames = 0  # frames of the clips that the source was made for; 0: as many
    stage.teacher.rename = ()  # 'pattern->replacement' on the source's parameter paths
    stage.teacher.leftover = ()  # patterns of the source's parameters that the encoder has no use for
    return stage


def smoke_latent(stage: ml_collections.ConfigDict) -> None:
    """A small predictor; a frozen encoder has random weights."""
    stage.predictor.width = 48
    stage.predictor.depth = 2
    stage.predictor.heads = 3
    stage.predictor.mlp_width = 96
    for mask in stage.views.values():
        mask.context = min(mask.context, 32)
    if stage.teacher.source or not stage.ema_decay:
        stage.teacher.source = "random:0"
        stage.teacher.old_frames = 0
