"""The report: pictures read back pixel by pixel, charts read back from their SVG, and what people see."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from invideo_jax import metrics, report
from invideo_jax.errors import UserError
from invideo_jax.report import __main__ as command
from invideo_jax.report import curve, pictures, sections
from invideo_jax.report.workdir import read

SVG = "{http://www.w3.org/2000/svg}"


def smooth_clips(count: int = 3, frames: int = 5, size: int = 64) -> dict[str, np.ndarray]:
    """Moving colour gradients, half of each frame hidden, and a darker reconstruction."""
    y, x = np.mgrid[:size, :size] / size
    clip = np.stack(
        [
            [
                np.stack([(x + t / frames) % 1, y, np.full_like(x, i / count)], -1)
                for t in range(frames)
            ]
            for i in range(count)
        ]
    )
    original = np.rint(clip * 255).astype(np.uint8)
    masked = original.copy()
    masked[..., : size // 2, :, :] = 128
    filled = original.copy()
    filled[..., : size // 2, :, :] //= 2
    return {"original": original, "masked": masked, "reconstruction": filled}


@pytest.fixture
def workdir(tmp_path):
    """A workdir as a run leaves it."""
    folder = tmp_path / "my <run>"
    with metrics.open_writers(folder, steps_done=None, process_index=0) as writer:
        for step in (10, 20, 30):
            writer.write_scalars(
                step,
                {
                    "masked/loss": 10 / step,
                    "masked/learning_rate": 1e-4 * step,
                    "masked/grad_norm": 0.5 if step != 20 else np.nan,
                    "masked/skipped": 2.0,
                    "masked/update_ratio/blocks": [0.1, 0.2],
                    "perf/clips": 320.0,
                    "perf/seconds": 4.0 if step == 10 else 8.0,
                    "perf/clips_per_s": 3200 / step,
                    "perf/data_wait": 0.5 if step == 10 else 0.0,
                },
            )
            writer.write_scalars(
                step,
                {"eval/reconstruction/loss": 0.9 - step / 100, "eval/reconstruction/psnr": 20.5},
            )
    (folder / "reconstructions").mkdir()
    np.savez(folder / "reconstructions" / "step_00000010.npz", **smooth_clips(1))
    np.savez(folder / "reconstructions" / "step_00000030.npz", **smooth_clips())
    config = {"seed": 3, "stages": {"masked": {"target": {"normalise": True}, "length": "<30>"}}}
    sources = {"seed": "command line: --config.seed=3", "stages.masked.length": "configs/a.py:7"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "config_sources.json").write_text(json.dumps(sources))
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"jax": "1"}})
    )
    (folder / "parameters.txt").write_text("| Name |\n| <kernel> |\nTotal: 1,234 -- 4,936 bytes")
    rows = [{"path": f"{i}.mp4", "id": str(i), "reason": "truncated"} for i in range(12)]
    rows.append({"path": "<x>.mp4", "id": "x", "reason": "no_video", "detail": "audio only"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "bad_examples.jsonl").write_text(lines + '{"path": "half')
    return folder


def read_pictures(data: bytes) -> list[np.ndarray]:
    """All frames of a picture file, by PyAV."""
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


# --- pictures


def test_a_strip_shows_the_chosen_frames_where_it_says():
    clips = smooth_clips(1, frames=16, size=112)
    clip = {name: values[0] for name, values in clips.items()}
    strip = pictures.strip(clip, frames=4, size=112)
    left = strip.shape[1] - (4 * 112 + 3 * 3)
    assert strip.shape[0] == 3 * 112 + 2 * 3 and left > 80  # room for the names
    for row, name in enumerate(pictures.PANELS):
        for column, frame in enumerate((0, 5, 10, 15)):
            top, at = row * 115, left + column * 115
            np.testing.assert_array_equal(
                strip[top : top + 112, at : at + 112], clip[name][frame], err_msg=f"{name} {frame}"
            )
        ink = strip[row * 115 : row * 115 + 112, :left]
        assert (ink < 120).any() and (ink[:20] == 255).all()


def test_an_animation_has_original_masked_and_reconstruction_side_by_side():
    clips = smooth_clips(2, size=160)
    rows = [{name: values[i] for name, values in clips.items()} for i in range(2)]
    shown = pictures.animation(rows, size=160)
    top = shown.shape[1] - (2 * 160 + 6)
    assert shown.shape[0] == 5 and shown.shape[2] == 3 * 160 + 2 * 6 and 15 < top < 40
    for i in range(2):
        for column, name in enumerate(pictures.PANELS):
            y, x = top + i * 166, column * 166
            np.testing.assert_array_equal(shown[:, y : y + 160, x : x + 160], clips[name][i])
    assert (shown[:, top + 160 : top + 166] == 255).all()
    assert (shown[:, :top] < 120).any()


def test_a_gif_has_all_frames_close_to_the_original_and_repeats():
    clips = smooth_clips(1, frames=6)
    frames = clips["original"][0]
    data = pictures.gif(frames, fps=10)
    assert data[:6] == b"GIF89a" and b"NETSCAPE2.0\x03\x01\x00\x00" in data  # endless
    found = read_pictures(data)
    assert len(found) == 6
    for i, frame in enumerate(found):
        error = np.abs(frame.astype(int) - frames[i])
        assert error.mean() < 10, i  # 256 colours for all; a neighbouring frame is farther away
        assert error.mean() < np.abs(frame.astype(int) - frames[(i + 1) % 6]).mean() / 2
    with av.open(io.BytesIO(data)) as file:
        times = [float(p.pts * p.time_base) for p in file.demux(video=0) if p.pts is not None]
    np.testing.assert_allclose(np.diff(times), 0.1, atol=0.011)


def test_a_gif_of_few_colours_is_exact_and_one_frame_is_enough():
    frames = np.zeros((1, 8, 12, 3), np.uint8)
    frames[..., :6, 0] = 255
    (found,) = read_pictures(pictures.gif(frames))
    np.testing.assert_array_equal(found, frames[0])
    with pytest.raises(ValueError, match="Frames must be uint8"):
        pictures.gif(frames.astype(np.float32))


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(16, 8, (112, 56)), (448, 224, (112, 56))]
)
def test_resize_repeats_or_averages_whole_blocks(height, width, expected):
    picture = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    found = pictures.resize(picture, 112)
    assert found.shape == (2, *expected, 3)
    if height < 112:
        np.testing.assert_array_equal(found[:, ::7, ::7], picture)
        np.testing.assert_array_equal(found[:, 6::7, 6::7], picture)
    else:
        block = picture[1, 4:8, 8:12].astype(float).mean((0, 1))
        np.testing.assert_array_equal(found[1, 1, 2], np.rint(block).astype(np.uint8))


def test_labels_are_dark_on_white_and_differ():
    found = [pictures.label(text) for text in pictures.PANELS.values()]
    for text in found:
        assert text.min() < 100 and (text[0] == 255).all() and (text[:, -1] == 255).all()
    widths = [text.shape[1] for text in found]
    assert widths[0] < widths[1] < widths[2]


# --- charts


@hypothesis.given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 9))
def test_ticks_are_round_enclose_the_range_and_are_about_as_many_as_asked(low, span, count):
    high = low + span
    hypothesis.assume(span > 1e-9 * abs(low))
    found = curve.ticks(low, high, count)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step and found[-1] >= high - 1e-6 * step
    assert count / 2 - 1 <= len(found) <= count + 3
    assert round(step / 10.0 ** np.floor(np.log10(step * 1.001)), 3) in (1, 2, 5)


def points_of(svg: str) -> list[tuple[float, float]]:
    path = ET.fromstring(svg).find(f"{SVG}path").get("d")
    return [(float(x), float(y)) for _, x, y in re.findall(r"([ML])([-\d.]+) ([-\d.]+)", path)]


def labels_of(svg: str, anchor: str) -> dict[str, tuple[float, float]]:
    texts = ET.fromstring(svg).iter(f"{SVG}text")
    chosen = [t for t in texts if t.get("text-anchor") == anchor]
    return {t.text: (float(t.get("x")), float(t.get("y"))) for t in chosen}


def test_points_of_a_chart_lie_where_its_axes_say():
    svg = curve.chart([curve.Line("a", [0, 50, 100], [1.0, 0.4, 0.2])], title="Loss")
    heights = {float(k): y - 4 for k, (_, y) in labels_of(svg, "end").items()}
    places = {k: x for k, (x, _) in labels_of(svg, "middle").items()}
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x0 == pytest.approx(places["0"]) and x2 == pytest.approx(places["100"])
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 == pytest.approx(heights[1.0], abs=0.1)
    assert y1 == pytest.approx(heights[0.4], abs=0.1)
    assert y2 == pytest.approx(heights[0.2], abs=0.1)


def test_values_that_are_not_finite_leave_a_gap():
    svg = curve.chart([curve.Line("a", [1, 2, 3, 4], [1.0, np.nan, 2.0, 3.0])], title="x")
    path = ET.fromstring(svg).find(f"{SVG}path").get("d")
    assert [letter for letter in path if letter.isalpha()] == ["M", "M", "L"]
    assert curve.chart([curve.Line("a", [1], [np.nan])], title="x") == ""
    assert curve.chart([], title="x") == ""


def test_a_chart_of_one_point_or_one_value_is_drawn():
    svg = curve.chart([curve.Line("a & b", [7], [3.0])], title="<t>")
    circle = ET.fromstring(svg).find(f"{SVG}circle")
    assert 0 < float(circle.get("cy")) < 300 and "a &amp; b" in svg and "&lt;t&gt;" in svg
    ((_, y), *_) = points_of(curve.chart([curve.Line("a", [1, 2], [5.0, 5.0])], title="x"))
    assert 0 < y < 300


def test_long_lines_are_thinned_and_keep_their_end():
    x = list(range(100_001))
    found = points_of(curve.chart([curve.Line("a", x, [1.0 * v for v in x])], title="x"))
    assert 500 < len(found) <= 1001
    assert found[-1][0] == pytest.approx(720 - 26)


def test_the_reference_is_within_the_chart():
    svg = curve.chart([curve.Line("a", [1, 2], [0.4, 0.3])], title="x", reference=(1.0, "mean"))
    dashed = [e for e in ET.fromstring(svg).iter(f"{SVG}line") if e.get("stroke-dasharray")]
    assert len(dashed) == 1 and 40 <= float(dashed[0].get("y1")) < points_of(svg)[0][1]


# --- the page


def test_the_page_holds_every_picture_inside_and_beside(workdir):
    page = report.build(workdir)
    html = page.read_text()
    assert page == workdir / "report" / "index.html"
    names = {p.name for p in page.parent.iterdir()}
    assert names == {"index.html", "loss.svg", "reconstructions.gif", "reconstructions.png"} | {
        f"clip_{i}.{kind}" for i in range(3) for kind in ("gif", "png")
    }
    inline = re.findall(r"src='data:image/(\w+);base64,([^']+)'", html)
    assert [kind for kind, _ in inline] == ["gif", "png", "png", "png"]
    files = ["reconstructions.gif", "clip_0.png", "clip_1.png", "clip_2.png"]
    for (_, data), name in zip(inline, files, strict=True):
        assert base64.b64decode(data) == (page.parent / name).read_bytes()
    assert not re.findall(r"(?:src|href)=(?!'data:)", html)  # nothing is fetched
    assert (page.parent / "loss.svg").read_text() in html


def test_the_pictures_are_those_of_the_newest_clips(workdir):
    folder = report.build(workdir).parent
    clips = smooth_clips()
    rows = [{name: values[i] for name, values in clips.items()} for i in range(3)]
    (still,) = read_pictures((folder / "reconstructions.png").read_bytes())
    np.testing.assert_array_equal(still, pictures.animation(rows, size=112)[2])
    (strip,) = read_pictures((folder / "clip_1.png").read_bytes())
    np.testing.assert_array_equal(strip, pictures.strip(rows[1]))
    assert len(read_pictures((folder / "clip_2.gif").read_bytes())) == 5


def cards_of(html: str) -> dict[str, str]:
    return {k: v for v, k in re.findall(r"<div class='card'><b>(.*?)</b>(.*?)</div>", html)}


def test_the_page_has_the_right_numbers(workdir):
    html = report.build(workdir).read_text()
    assert cards_of(html) == {
        "updates": "30",
        "clips seen": "960",
        "training time": "20s",
        "speed": "48.0 clips/s",  # 960 clips in 20 s
        "waiting for data": "10.0 %",  # 2 of 20 s
        "masked/loss": f"{1 / 3:.4f}",
        "eval/reconstruction/loss": "0.6000",
        "eval/reconstruction/psnr": "20.50 dB",
        "skipped updates": "2",
    }
    assert "<td>reconstruction/loss</td><td>0.8000 (at 10)</td><td>0.6000 (at 30)</td>" in html
    assert "after 30 updates" in html
    assert "<td>truncated</td><td>12</td>" in html and "<td>no_video</td><td>1</td>" in html
    assert "The first 10 of 13 rows" in html
    assert "<td>seed</td><td>3</td></tr>" in html  # changed on the command line
    assert (
        "<td>stages.masked.length</td><td>&quot;&lt;30&gt;&quot;</td><td>configs/a.py:7</td>"
        in html
    )
    assert "<summary>Total: 1,234 -- 4,936 bytes</summary>" in html
    assert "predicting each patch" in html


def test_what_users_wrote_is_escaped(workdir):
    html = report.build(workdir).read_text()
    assert "<title>my &lt;run&gt;: training report</title>" in html
    assert "&lt;kernel&gt;" in html and "<kernel>" not in html and "my <run>" not in html
    (workdir / "bad_examples.jsonl").write_text('{"path": "<x>.mp4", "reason": "a&b"}\n')
    html = report.build(workdir).read_text()
    assert "<td>&lt;x&gt;.mp4</td><td>a&amp;b</td>" in html and "<x>" not in html


def test_the_loss_curve_shows_training_and_evaluation(workdir):
    svg = (report.build(workdir).parent / "loss.svg").read_text()
    assert points_of(svg)[0][1] < points_of(svg)[-1][1]  # falls: y grows downwards
    root = ET.fromstring(svg)
    assert len(root.findall(f".//{SVG}circle")) == 3  # one an evaluation
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"masked", "eval/reconstruction", "Loss", "update"} <= set(texts)


def test_a_workdir_with_metrics_alone_gives_a_page(tmp_path):
    writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(5, {"masked/loss": 0.75})
    writer.close()
    html = report.build(tmp_path).read_text()
    assert cards_of(html) == {
        "updates": "5",
        "clips seen": "0",
        "training time": "0s",
        "masked/loss": "0.7500",
    }
    for absent in ("Reconstructions", "Config", "Parameters", "Made with", "<img", "predicting"):
        assert absent not in html
    assert "every video asked for was used" in html
    assert f"python -m invideo_jax.report {tmp_path}" in html


def test_the_page_is_the_same_when_made_again(workdir):
    first = report.build(workdir).read_bytes()
    assert report.build(workdir).read_bytes() == first


def test_a_new_section_is_one_function_and_one_line(workdir, monkeypatch):
    def gallery(run, files):
        files["extra.txt"] = b"content"
        return f"<p>retrieval at {run.step}</p>"

    monkeypatch.setattr(sections, "SECTIONS", (*sections.SECTIONS, gallery))
    page = report.build(workdir)
    assert "<p>retrieval at 30</p>" in page.read_text()
    assert (page.parent / "extra.txt").read_bytes() == b"content"


def test_series_skip_what_is_no_number(workdir):
    run = read(workdir)
    assert run.series("perf/clips_per_s") == ([10, 20, 30], [320.0, 160.0, 3200 / 30])
    assert run.series("masked/update_ratio/blocks") == ([], [])
    assert run.series("absent") == ([], [])
    assert "masked/update_ratio/blocks" not in run.names() and "masked/loss" in run.names()


def test_errors_are_for_people(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    with pytest.raises(UserError, match="WORKDIR must be the folder of a run; got .*nowhere"):
        report.build(missing)
    with pytest.raises(UserError, match=r"has no metrics yet \(metrics.jsonl is absent\)"):
        report.build(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"has no metrics yet \(metrics.jsonl is empty\)"):
        report.build(tmp_path)
    assert not (tmp_path / "report").exists()
    with pytest.raises(SystemExit) as stop:
        command.main([str(missing)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: WORKDIR must be") and "Traceback" not in error


def test_a_broken_config_file_is_named(workdir):
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json must be JSON; .* Restore or remove the file"):
        report.build(workdir)


def test_the_command_works_without_any_extra(workdir):
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'PIL', 'tensorboardX', 'tensorflow', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from invideo_jax.report.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, workdir],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(workdir / "report" / "index.html")
    assert (workdir / "report" / "reconstructions.gif").stat().st_size > 1000


def test_stages_have_a_loss_chart_each_and_retrieval_has_its_own(tmp_path):
    """Losses of two stages differ a thousandfold; what finds what is drawn beside chance."""
    folder = tmp_path / "run"
    with metrics.open_writers(folder, steps_done=None, process_index=0) as writer:
        writer.write_scalars(10, {"masked/loss": 0.008})
        writer.write_scalars(10, {"eval/reconstruction/loss": 0.009})
        for step, r1 in ((20, 0.05), (30, 0.1)):
            writer.write_scalars(step, {"contrastive/loss": 4.0})
            found = {"text_video_r1": r1, "video_text_r5": 3 * r1, "chance_r1": 0.01}
            found |= {"video_text_chance_r1": 0.01, "text_video_median_rank": 12.0}
            writer.write_scalars(step, {f"eval/retrieval/{k}": v for k, v in found.items()})
    page = report.build(folder)
    lines = {
        name: set(labels_of((page.parent / name).read_text(), "start"))
        for name in ("loss.svg", "loss_contrastive.svg", "retrieval.svg")
    }
    assert lines["loss.svg"] == {"Loss, masked", "masked", "eval/reconstruction"}
    assert lines["loss_contrastive.svg"] == {"Loss, contrastive", "contrastive"}
    assert lines["retrieval.svg"] == {"First (r1), among five (r5)"} | {
        "text_video_r1",
        "video_text_r5",
    }
    assert "chance of r1" in labels_of((page.parent / "retrieval.svg").read_text(), "end")
    assert "<h2>Retrieval</h2>" in page.read_text()
