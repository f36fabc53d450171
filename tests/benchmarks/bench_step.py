"""Train step against PyTorch's VideoMAE: same model, batch and threads, in one run, interleaved.

    python tests/benchmarks/bench_step.py --size=S --image_size=112 --ratio=0.8 --batch_size=8

PyTorch is `transformers.VideoMAEForPreTraining` with `torch.optim.AdamW`, and makes no more than it
must: forward, backward, optimiser. Ours is the whole public step with its finite guard, gradient norm
and update ratios. Both get float32 and the same clips; PyTorch's are normalised beforehand, ours come
as uint8. Steps alternate, so that the machine's other work hits both; it hurts PyTorch's
OpenMP threads far more, which wait for each other, so only a run on an idle machine says anything.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from invideo_jax import sharding, state  # noqa: E402
from invideo_jax.models import pixels, sizes, video_mae  # noqa: E402
from invideo_jax.steps import masked  # noqa: E402

BETAS, DECAY, RATE = (0.9, 0.95), 0.05, 1e-4


def ours(options: argparse.Namespace, video: np.ndarray):
    """Our step: a function without arguments that does one update and waits for it."""
    model = video_mae.build(
        options.size,
        image_size=options.image_size,
        frames=options.frames,
        scan=options.scan,
        remat=options.remat,
    )
    tx = optax.adamw(RATE, *BETAS, weight_decay=DECAY)
    params = jax.jit(lambda: sharding.unbox(video_mae.init(model, jax.random.key(0))))()
    step = jax.jit(
        masked.make_train_step(
            model=model,
            tx=tx,
            stage_key=jax.random.key(1),
            mask=dict(name="tube", ratio=options.ratio),
        ),
        donate_argnums=0,
    )
    count = len(video)
    batch = jax.device_put(
        dict(
            video=video,
            position=np.arange(count, dtype=np.uint32),
            label=np.full(count, -1, np.int32),
            valid=np.ones(count, bool),
        )
    )
    held = {"state": state.create(params, tx, keep_ema=False)}

    def run() -> float:
        held["state"], metrics = step(held["state"], batch)
        return float(metrics["loss"].value)

    return run


def theirs(options: argparse.Namespace, video: np.ndarray):
    """PyTorch's step, likewise."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    row = sizes.video_mae(options.size)
    config = transformers.VideoMAEConfig(
        image_size=options.image_size,
        patch_size=row.patch,
        num_frames=options.frames,
        hidden_size=row.width,
        num_hidden_layers=row.depth,
        num_attention_heads=row.heads,
        intermediate_size=row.mlp_width,
        decoder_hidden_size=row.decoder_width,
        decoder_num_hidden_layers=row.decoder_depth,
        decoder_num_attention_heads=row.decoder_heads,
        decoder_intermediate_size=row.decoder_mlp_width,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
    )
    model = transformers.VideoMAEForPreTraining(config).train()
    # The fused form is PyTorch's fastest on CPU.
    optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=DECAY, fused=True)
    clips = np.array(pixels.normalise(video, "imagenet").transpose(0, 1, 4, 2, 3))
    clips = torch.from_numpy(clips)
    side, times = options.image_size // row.patch, options.frames // 2
    hidden = np.zeros(side * side, bool)
    hidden[np.random.default_rng(1).permutation(side * side)[: int(options.ratio * side**2)]] = True
    mask = torch.from_numpy(np.tile(hidden, (len(video), times)))

    def run() -> float:
        optimizer.zero_grad()
        loss = model(clips, bool_masked_pos=mask).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="S")
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--only", choices=["ours", "theirs"], help="run one side alone")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    shape = (options.batch_size, options.frames, options.image_size, options.image_size, 3)
    video = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    makers = {"ours": ours, "theirs": theirs}
    runs = {k: make(options, video) for k, make in makers.items() if options.only in (None, k)}
    for run in runs.values():  # compile, first touch
        run(), run()
    taken = {name: [] for name in runs}
    for _ in range(options.steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(1e3 * (time.perf_counter() - start))
    for name, values in taken.items():
        quick, median = min(values), statistics.median(values)
        print(f"{name:7} median {median:7.1f} ms  least {quick:7.1f} ms  ({len(values)} steps)")
    if len(taken) == 2:
        medians, least = (f(taken["ours"]) / f(taken["theirs"]) for f in (statistics.median, min))
        print(f"ours / PyTorch: {medians:.3f} of medians, {least:.3f} of least (below 1 is faster)")
        print("Run it alone: other load slows PyTorch far more than JAX, and flatters the ratio.")


if __name__ == "__main__":
    main()
