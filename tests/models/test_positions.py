"""Sine-cosine tables against loops, interpolation against PyTorch, inflation of patch kernels."""

import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.models import positions


def code(p, m, size):
    """Channel m of the code of place p: sines, then cosines."""
    half = size // 2
    angle = p / 10000 ** ((m % half) / half)
    return np.sin(angle) if m < half else np.cos(angle)


def test_three_dimensional_table_against_a_loop():
    t, h, w, width = 3, 2, 4, 32
    table = positions.sincos_3d((t, h, w), width)
    assert table.shape == (1 + t * h * w, width) and (table[0] == 0).all()
    for n, (time, row, column) in enumerate(np.ndindex(t, h, w)):
        want = [code(time, m, 8) for m in range(8)]
        want += [code(column, m, 12) for m in range(12)]
        want += [code(row, m, 12) for m in range(12)]
        np.testing.assert_allclose(table[1 + n], want, atol=1e-6)
    np.testing.assert_array_equal(positions.sincos_3d((t, h, w), width, prefix=0), table[1:])


@pytest.mark.parametrize(
    "old, new",
    [
        ((8, 4, 4), (4, 4, 4)),
        ((4, 3, 3), (8, 6, 6)),
        ((2, 5, 5), (6, 3, 3)),
        ((8, 2, 2), (1, 4, 4)),
    ],
)
def test_interpolation_against_pytorch(old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1 + np.prod(old), 6)).astype(np.float32)
    resize = torch.nn.functional.interpolate
    x = torch.tensor(table[1:]).reshape(old[0], -1).T[None]  # [1, places*D, t]
    x = resize(x, size=new[0], mode="linear")[0].T.reshape(new[0], old[1], old[2], 6)
    x = resize(x.permute(0, 3, 1, 2), size=new[1:], mode="bicubic").permute(0, 2, 3, 1)
    found = positions.interpolate(table, old_times=old[0], grid=new)
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], x.reshape(-1, 6), atol=2e-6)


def test_interpolation_keeps_constants_lines_and_equal_grids():
    table = np.random.default_rng(0).normal(size=(1 + 2 * 9, 4)).astype(np.float32)
    np.testing.assert_array_equal(positions.interpolate(table, old_times=2, grid=(2, 3, 3)), table)
    flat = positions.interpolate(np.ones((18, 4)), old_times=2, grid=(5, 7, 4), prefix=0)
    np.testing.assert_allclose(flat, 1.0, atol=1e-6)
    line = np.repeat(np.arange(4.0), 4)[:, None]  # time only
    longer = positions.interpolate(line, old_times=4, grid=(8, 2, 2), prefix=0)
    np.testing.assert_allclose(
        longer.reshape(8, 4),
        np.clip(np.arange(8) / 2 - 0.25, 0, 3)[:, None].repeat(4, 1),
        atol=1e-6,
    )


def test_a_wrong_old_length_says_so():
    table = np.zeros((1 + 8 * 16, 4), np.float32)
    with pytest.raises(UserError, match="got old_times=3 for 128 places.*2, 8"):
        positions.interpolate(table, old_times=3, grid=(4, 4, 4))
    with pytest.raises(UserError, match="got old_times=4 for 128 places"):
        positions.interpolate(table, old_times=4, grid=(4, 4, 4))
    # Twice as many places in half as many times would be a square, too: the caller can say the sides.
    with pytest.raises(UserError, match=r"got old_times=2, old_space=\(4, 4\)"):
        positions.interpolate(table, old_times=2, grid=(4, 4, 4), old_space=(4, 4))
    wide = positions.interpolate(table, old_times=4, grid=(4, 2, 2), old_space=(4, 8))
    assert wide.shape == (1 + 16, 4)


def test_inflated_kernels_see_still_videos_as_the_frame():
    rng = np.random.default_rng(0)
    kernel, cube = rng.normal(size=(12, 5)), rng.normal(size=12)
    for tubelet in (2, 3):
        still = np.tile(cube, tubelet)
        for centre in (False, True):
            found = positions.inflate(kernel, tubelet, centre=centre)
            np.testing.assert_allclose(still @ found, cube @ kernel)
        parts = positions.inflate(kernel, tubelet, centre=True).reshape(tubelet, 12, 5)
        np.testing.assert_array_equal(parts[tubelet // 2], kernel)
        assert (np.delete(parts, tubelet // 2, axis=0) == 0).all()


def test_widths_that_do_not_split_say_so():
    with pytest.raises(UserError, match="multiple of 16; got width=24"):
        positions.sincos_3d((2, 2, 2), 24)


@pytest.mark.parametrize("old, new", [(7, 5), (4, 9), (224, 196), (3, 3)])
def test_frames_are_resized_as_torch_does(old, new):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 1, old, old + 1), np.float32)
    size = dict(size=(new, new), mode="bicubic", align_corners=False, antialias=False)
    want = torch.nn.functional.interpolate(torch.from_numpy(x), **size).numpy()
    rows, columns = positions.cubic_matrix(old, new), positions.cubic_matrix(old + 1, new)
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(rows @ x @ columns.T, want, atol=2e-5)
