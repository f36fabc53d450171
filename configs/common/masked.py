"""A stage of masked pixel reconstruction."""

import ml_collections


def masked_stage() -> ml_collections.ConfigDict:
    """A stage of masked pixel reconstruction with the values of VideoMAE ViT-B on Kinetics-400.

    Source: VideoMAE (arXiv:2203.12602), appendix; MCG-NJU/VideoMAE scripts.
    """
    stage = ml_collections.ConfigDict()
    stage.step = "masked"  # which train step: invideo_jax/steps/
    stage.objective = "pixels"  # which loss of that step
    # Every duration reads '800 epochs', '20000 steps', '1e6 examples', '40%' or a number of steps. Percent
    # are of the stage; for the length of a stage itself, of total_steps.
    stage.length = "1600 epochs"
    stage.batch_size = 2048  # clips a step, over all devices
    stage.accumulation = 1  # microbatches a step; the result does not depend on it

    # Where the parameters come from at the start of the stage; every one that has no source must be named.
    stage.init = ml_collections.ConfigDict()
    # A workdir ('DIR', or 'DIR@STEP'), or a folder that interop.from_torch wrote; '': the stage before
    # (the first stage starts fresh); 'fresh': none, and nothing else of `init` counts.
    stage.init.source = ""
    stage.init.ema = True  # the moving average, where the source keeps one
    stage.init.rename = ()  # 'pattern->replacement' on the source's paths
    stage.init.fresh = ()  # patterns of parameters that start fresh
    stage.init.leftover = ()  # patterns of the source's parameters that are not taken
    stage.init.old_frames = 0  # frames the source's positions are for; 0: as the source says
    stage.init.inflate = ""  # a patch kernel over a longer tubelet: 'repeat' or 'centre'
    stage.init.label_map = ""  # classes kept of the source's head: 'first', or a JSON file

    stage.clip = ml_collections.ConfigDict()
    stage.clip.frames = 16
    stage.clip.size = 224  # pixels, height and width
    stage.clip.sampling = (
        "dense"  # a window of frames * stride; or 'segments': one frame in each equal part
    )
    stage.clip.stride = 4
    stage.clip.crop = "multi_scale"
    stage.clip.flip = 0.5  # probability; rows of a manifest with "flip": false are never flipped
    stage.clip.fps = (
        0.0  # with 'dense': frames a second, by the times of the frames; 0 counts frames
    )
    stage.clip.crop_scale = (0.08, 1.0)  # share of the area, of 'random_resized'
    stage.clip.crop_ratio = (0.75, 4 / 3)  # width over height, of 'random_resized'
    stage.clip.interpolation = "bilinear"
    stage.clip.randaugment = ""  # as 'rand-m7-n4-mstd0.5-inc1', for fine-tuning
    stage.clip.erase = 0.0  # probability of erasing a box

    stage.normalisation = "imagenet"
    stage.mask = ml_collections.ConfigDict(dict(name="tube", ratio=0.9))
    stage.target = ml_collections.ConfigDict()
    stage.target.normalise = True  # per cube and colour channel
    # A second mask, on what the decoder predicts, as VideoMAE V2's 'running_cell'; '': it predicts all.
    stage.target.decoder_mask = ml_collections.ConfigDict(dict(name="", ratio=0.5))

    stage.optimizer = ml_collections.ConfigDict()
    stage.optimizer.name = "adamw"
    stage.optimizer.learning_rate = (
        1.5e-4  # for a batch of `scale_by_batch`, in proportion for others
    )
    stage.optimizer.scale_by_batch = 256  # 0: the rate is used as it is
    stage.optimizer.b1 = 0.9
    stage.optimizer.b2 = 0.95
    stage.optimizer.eps = 1e-8
    stage.optimizer.weight_decay = 0.05
    stage.optimizer.momentum = 0.95  # of muon and sgd
    # Patterns are regular expressions on parameter paths ('encoder/blocks/query/kernel'); --explain lists them.
    stage.optimizer.no_decay = ()  # spared from weight decay, besides norms, biases and position tables
    stage.optimizer.lr_multipliers = ()  # 'pattern=factor' on the learning rate
    stage.optimizer.layer_decay = 1.0  # of the rate from block to block, down to the input
    stage.optimizer.freeze = ()  # not trained
    stage.optimizer.muon = ()  # the 2-D kernels that muon updates, instead of all those of the blocks
    stage.optimizer.clip_norm = 0.0  # 0: no clipping

    stage.schedule = ml_collections.ConfigDict()
    stage.schedule.name = "cosine"
    stage.schedule.warmup = "40 epochs"
    stage.schedule.warmup_start = 0.0  # the rate at the start, scaled like learning_rate
    stage.schedule.final = 1e-5  # and at the end
    stage.schedule.decay = "20%"  # the last part of a 'wsd' schedule; the others have none
    stage.schedule.decay_shape = "linear"  # or 'sqrt'; of 'wsd'

    stage.ema_decay = 0.0  # 0: keep no moving average of the parameters
    stage.ema_warmup = (
        False  # average over fewer updates at the start: min(ema_decay, (1 + n) / (10 + n))
    )
    return stage
