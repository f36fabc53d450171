"""From a video to one clip of fixed size: which frames, which box of the picture, flipped or not, augmented.

Every random choice comes from the generator that is passed in, in a fixed order (frames, box, flip,
augmentation, erasing), and holds for all frames of the clip: an equal generator gives equal bytes.
"""

import dataclasses
import math

import numpy as np

from invideo_jax.data import augment, sampling
from invideo_jax.data.decode import Limits, VideoReader, View
from invideo_jax.data.scaling import INTERPOLATIONS
from invideo_jax.registry import nearest

SAMPLINGS = (
    "dense",
    "window",
    "segments",
    "segments_inclusive",
    "tsn",
    "tsn_padded",
    "rand",
    "middle",
)
CROPS = ("multi_scale", "random_resized", "center", "three_crop", "resize")
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """What a clip is made of.

    Args:
        frames: T.
        size: height and width S of the clip.
        sampling: the rule for the frames, see `invideo_jax.data.sampling`: 'dense' (pretraining),
            'window' (dense fine-tuning), 'segments', 'segments_inclusive' (sparse fine-tuning),
            'tsn', 'tsn_padded', 'rand' and 'middle' (multi-modal).
        stride: distance of frames, for 'dense' and 'window'.
        fps: only for 'dense': rate that the video is seen at, by the times of its frames; 0 counts
            frames.
        crop: 'multi_scale' (corners and fixed places, pretraining), 'random_resized', 'center',
            'three_crop' (along the long side), 'resize' (all of the picture, its shape not kept).
        scales: shares of the short side, for 'multi_scale'.
        crop_scale, crop_ratio: ranges of the share of the area and of width / height, for
            'random_resized'.
        crop_index: 0, 1 or 2, for 'three_crop'.
        flip: probability of mirroring left and right.
        randaugment: e.g. 'rand-m7-n4-mstd0.5-inc1', or '' for none.
        erase: probability of erasing one box of all frames.
        views: 0 draws the frames at random; v >= 1 takes place `view` of v fixed places spread over
            the video.
        view: which of the `views` places.
        repeats: clips made of each video, one after the other in the order. Random ones differ in all
            that is drawn; of fixed ones see `of`.
        interpolation: 'bilinear' or 'bicubic'.
    """

    frames: int
    size: int
    sampling: str = "dense"
    stride: int = 4
    fps: float = 0.0
    crop: str = "multi_scale"
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_index: int = 1
    flip: float = 0.5
    randaugment: str = ""
    erase: float = 0.0
    views: int = 0
    view: int = 0
    repeats: int = 1
    interpolation: str = "bilinear"

    def __post_init__(self):
        for name in ("scales", "crop_scale", "crop_ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs give lists
        for name in ("frames", "size", "stride", "repeats"):
            value = getattr(self, name)
            _must(
                value >= 1 and value == int(value),
                f"{name} must be a whole number above 0",
                name,
                value,
            )
        for name, known in (
            ("sampling", SAMPLINGS),
            ("crop", CROPS),
            ("interpolation", INTERPOLATIONS),
        ):
            value = getattr(self, name)
            hint = "" if value in known else nearest(value, known).strip()
            _must(value in known, f"{name} must be one of {', '.join(known)}", name, value, hint)
        for name in ("flip", "erase"):
            value = getattr(self, name)
            _must(0 <= value <= 1, f"{name} must be a probability", name, value)
        self._check_views()
        self._check_crop()
        if self.randaugment:
            augment.parse_policy(self.randaugment)

    def _check_views(self) -> None:
        _must(
            self.fps >= 0 and (not self.fps or self.sampling == "dense"),
            "fps must be 0, or a rate with sampling='dense'",
            "fps",
            self.fps,
            f"Here sampling={self.sampling!r}.",
        )
        most = {"segments": 1, "tsn": 2, "rand": 0, "middle": 1}.get(self.sampling)
        _must(
            self.views >= 0 and (most is None or self.views <= most),
            f"views must be 0{'' if most == 0 else ' or more' if most is None else f' to {most}'} with "
            f"sampling={self.sampling!r}",
            "views",
            self.views,
        )
        _must(
            0 <= self.view < max(self.views, 1),
            f"view must be in [0, {max(self.views, 1)})",
            "view",
            self.view,
        )

        crops = 3 if self.crop == "three_crop" else 1
        _must(
            not self.views or self.repeats in (1, self.views * crops),
            f"repeats must be 1 or all {max(self.views, 1) * crops} views of a video",
            "repeats",
            self.repeats,
        )

    def of(self, position: int) -> "ClipSpec":
        """The clip at a position of the order: of `repeats` fixed ones each place with each crop."""
        if not self.views or self.repeats == 1:
            return self
        crops = self.repeats // self.views
        view, crop = divmod(position % self.repeats, crops)
        fixed = {"view": view} | ({"crop_index": crop} if crops > 1 else {})
        return dataclasses.replace(self, **fixed, repeats=1)

    def _check_crop(self) -> None:
        _must(
            self.crop_index in (0, 1, 2),
            "crop_index must be 0, 1 or 2",
            "crop_index",
            self.crop_index,
        )
        fine = len(self.scales) > 0 and all(0 < s <= 1 for s in self.scales)
        _must(fine, "scales must be shares in (0, 1], at least one", "scales", self.scales)
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            pair = getattr(self, name)
            fine = len(pair) == 2 and 0 < pair[0] <= pair[1] <= top
            _must(fine, f"{name} must be (low, high) with 0 < low <= high <= {top:g}", name, pair)


def _must(fine: bool, rule: str, name: str, value: object, hint: str = "") -> None:
    if not fine:
        raise ValueError(f"{rule}; got {name}={value!r}. {hint}".strip())


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """How a clip was made.

    Attributes:
        indices: frame numbers, within [start, end) where given.
        times: seconds from the beginning of the video at which the frames are shown.
        box: (x, y, width, height) of the picture as shown that became the clip.
        flipped: mirrored left and right.
        padded: how many of the T frames repeat another one because the video has too few.
        fallback: frames had to be counted from the start of the file.
        truncated: the file ends before its declared length; the clip is from the part that is
            there.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    box: Box
    flipped: bool
    padded: int
    fallback: bool
    truncated: bool


def load_clip(
    video: str | bytes,
    spec: ClipSpec,
    rng: np.random.Generator,
    *,
    start: float | None = None,
    end: float | None = None,
    flip_ok: bool = True,
    limits: Limits | None = None,
) -> tuple[np.ndarray, ClipInfo]:
    """Decodes one clip.

    Args:
        video: a local path, or the encoded bytes of a file.
        spec: what to make.
        rng: all randomness of the clip.
        start, end: seconds; only this part of the video is used.
        flip_ok: False where left and right have a meaning.
        limits: what the video may cost.

    Returns:
        (uint8 [T, S, S, 3] RGB, how it was made).

    Raises:
        BadVideo: the video cannot be used.
    """
    with VideoReader(video, limits=limits, start=start, end=end) as reader:
        times = reader.times()
        indices = pick_frames(spec, times, rng)
        boxes: list[Box] = []

        def view(width: int, height: int) -> View:
            boxes.append(pick_box(spec, width, height, rng))
            return View(boxes[0], (spec.size, spec.size), spec.interpolation)

        clip = reader.frames(indices, view=view)
        fallback, truncated = reader.fallbacks > 0, reader.truncated
    clip, flipped = augmented(clip, spec, rng, flip_ok=flip_ok)
    return clip, ClipInfo(
        indices=tuple(int(i) for i in indices),
        times=tuple(float(times[i]) for i in indices),
        box=boxes[0],
        flipped=flipped,
        padded=len(indices) - len(set(indices.tolist())),
        fallback=fallback,
        truncated=truncated,
    )


def augmented(
    clip: np.ndarray, spec: ClipSpec, rng: np.random.Generator, *, flip_ok: bool
) -> tuple[np.ndarray, bool]:
    """What is done to the pixels of a clip once they are cut: mirrored, changed, erased; and whether mirrored."""
    drawn = rng.random() < spec.flip  # in any case: the later draws stay the same
    flipped = bool(drawn) and flip_ok
    if flipped:
        mirror(clip)
    if spec.randaugment:
        clip = augment.rand_augment(clip, augment.parse_policy(spec.randaugment), rng)
    if spec.erase:
        clip = augment.random_erase(clip, spec.erase, rng)
    return clip, flipped


def mirror(clip: np.ndarray) -> None:
    """Exchanges left and right in place, uint8 [T, H, W, C].

    One channel of one picture at a time: NumPy moves reversed pixels of 3 bytes one by one, at a
    fifth of the speed.
    """
    for image in clip:
        source = image.copy()
        for channel in range(image.shape[-1]):
            image[..., channel] = source[:, ::-1, channel]


def pick_frames(spec: ClipSpec, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns int64 [T] frame numbers of a video whose frames are shown at `times` (seconds, rising)."""
    n, t, stride, views, view = len(times), spec.frames, spec.stride, spec.views, spec.view
    random = rng if views == 0 else None
    if spec.fps:
        return sampling.by_time(times, t, spec.fps, stride, random, view=(view, max(views, 1)))
    if spec.sampling == "middle":
        return sampling.middle(n, t)
    if spec.sampling == "segments":
        return sampling.segments(n, t, random)
    if spec.sampling == "window" and views <= 1:
        return sampling.window(n, t, stride, random)
    if random is not None:
        if spec.sampling == "dense":
            return sampling.dense(n, t, stride, rng)
        rule = "tsn_segments" if spec.sampling == "tsn" else spec.sampling
        return getattr(sampling, rule)(n, t, rng)
    if spec.sampling == "tsn":
        return sampling.tsn_middle(n, t) if views == 1 else sampling.tsn_view(n, t, view)
    if spec.sampling == "segments_inclusive":
        return sampling.segments_inclusive_view(n, t, view, views)
    if spec.sampling == "tsn_padded":
        return sampling.tsn_padded_view(n, t, view, views)
    return sampling.dense_view(n, t, stride, view, views)


def pick_box(spec: ClipSpec, width: int, height: int, rng: np.random.Generator) -> Box:
    """Returns the (x, y, width, height) of the picture that becomes the clip."""
    if spec.crop == "multi_scale":
        return multi_scale_box(width, height, spec.size, spec.scales, rng)
    if spec.crop == "random_resized":
        return random_resized_box(width, height, spec.crop_scale, spec.crop_ratio, rng)
    if spec.crop == "resize":
        return 0, 0, width, height
    side, place = min(width, height), spec.crop_index if spec.crop == "three_crop" else 1
    return (width - side) * place // 2, (height - side) * place // 2, side, side


def multi_scale_box(
    width: int, height: int, size: int, scales: tuple[float, ...], rng: np.random.Generator
) -> Box:
    """A box at one of 13 fixed places, its sides each a share of the short side, at most one step of `scales` apart.

    Source: the multi-scale crop of TSN, as in VideoMAE pretraining (scales 1, .875, .75, .66). A
    side within 2 pixels of the clip's size is set to that size, so that nothing is resized.
    """
    short = min(width, height)
    sides = [int(short * s) for s in scales]
    sides = [min(size, short) if abs(s - size) < 3 else max(s, 1) for s in sides]
    pairs = [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    w, h = pairs[int(rng.integers(0, len(pairs)))]
    quarters = [(i, j) for j in (0, 2, 4) for i in (0, 2, 4)] + [(1, 1), (3, 1), (1, 3), (3, 3)]
    i, j = quarters[int(rng.integers(0, len(quarters)))]
    return i * ((width - w) // 4), j * ((height - h) // 4), w, h


def random_resized_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A box of a random share of the area and a random shape (log-uniform); the middle one after 10 that do not fit."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(x), int(y), w, h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(round(height * shape), 1)), min(height, max(round(width / shape), 1))
    return (width - w) // 2, (height - h) // 2, w, h
