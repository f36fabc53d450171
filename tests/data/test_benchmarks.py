"""Published benchmarks, each in a small folder of its published format: ids, captions, times, labels, counts, errors."""

import collections
import json
import os
import pathlib
import pickle
import re

import numpy as np
import pytest
from small_videos import write_video

from invideo_jax.data.benchmarks import BENCHMARKS
from invideo_jax.data.benchmarks.base import stem
from invideo_jax.data.sources import NoSuchSplit, SourceError, open_source
from invideo_jax.data.transforms import ClipSpec, load_clip

KINETICS = "label,youtube_id,time_start,time_end,split\n"


class Folder:
    """A folder of a benchmark that is written piece by piece."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def write(self, name: str, content) -> "Folder":
        """Text as it is, bytes as they are, anything else as JSON."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return self

    def videos(self, *names: str) -> "Folder":
        """Files that nobody decodes."""
        for name in names:
            self.write(f"videos/{name}", b"not decoded")
        return self

    def open(self, name: str, split: str | None = None, **options):
        return open_source(f"benchmark:{name}:{self.path}", split=split, **options)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "set")


def examples(source) -> list:
    return [source[i] for i in range(len(source))]


def captions(source) -> dict[str, tuple[str, ...]]:
    return {example["id"]: example["captions"] for example in examples(source)}


def labels(source) -> dict[str, tuple[int, str]]:
    return {e["id"]: (e["label"], e["label_name"]) for e in examples(source)}


# Retrieval ------------------------------------------------------------------------------------------------------------


def test_msrvtt_1k_from_the_published_table(folder):
    table = 'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a man, who sings"\nret1,msr1,video9771,a  dog\n'
    folder.write("anns/MSRVTT_JSFUSION_test.csv", table).videos(
        "all/video9771.webm", "video9770.mp4"
    )
    source = folder.open("msrvtt_1k", "test")
    assert captions(source) == {"video9770": ("a man, who sings",), "video9771": ("a dog",)}
    assert source[1]["path"].endswith("videos/all/video9771.webm")
    assert (source[0]["start"], source[0]["end"], source[0]["label"]) == (None, None, -1)
    assert source[0]["split"] == "test" and source.notes == ()
    assert captions(folder.open("msrvtt_1k")) == captions(source), "test is the default"


def test_msrvtt_1k_from_a_caption_list_and_the_training_tables(folder):
    rows = [
        {"video": "video7010.mp4", "caption": "one"},
        {"video": "video7011.mp4", "caption": ["b", "c"]},
    ]
    folder.write("msrvtt_ret_test1k.json", rows).write(
        "MSRVTT_train.9k.csv", "video_id\nvideo1\nvideo0\n"
    )
    pairs = [("video0", "x"), ("video1", "y"), ("video0", "z")]
    data = {"videos": [], "sentences": [{"video_id": v, "caption": c} for v, c in pairs]}
    folder.write("MSRVTT_data.json", data)
    folder.videos("video7010.mp4", "video7011.mp4", "video0.mp4", "video1.mp4")
    assert captions(folder.open("msrvtt_1k", "test")) == {
        "video7010": ("one",),
        "video7011": ("b", "c"),
    }
    train = folder.open("msrvtt_1k", "train")
    assert list(captions(train).items()) == [("video1", ("y",)), ("video0", ("x", "z"))]


def test_msrvtt_full_takes_the_official_splits(folder):
    videos = [
        {"video_id": f"video{i}", "split": s} for i, s in enumerate(["train", "validate", "test"])
    ]
    sentences = [{"video_id": f"video{i}", "caption": f"text {i}"} for i in (2, 1, 0)]
    folder.write("MSRVTT_data.json", {"videos": videos, "sentences": sentences})
    folder.videos("video0.mp4", "video1.mp4", "video2.mp4")
    for split, wanted in (("test", "video2"), ("val", "video1"), ("train", "video0")):
        assert list(captions(folder.open("msrvtt_full", split))) == [wanted]


def test_didemo_joins_descriptions_of_the_first_30_seconds(folder):
    rows = [
        {"video": "1@N00_2_3.m4v", "description": "a cat", "times": [[0, 0]]},
        {"video": "4@N00_5_6.", "description": "a dog.", "times": [[1, 1]]},
        {"video": "1@N00_2_3.m4v", "description": "it  leaves", "times": [[4, 5]]},
        {"video": "7@N00_8_9.avi", "description": "left out", "times": [[0, 0]]},
    ]
    folder.write("test_data.json", rows).write("test_list.txt", "4@N00_5_6.\n1@N00_2_3.m4v\n")
    folder.videos("1@N00_2_3.m4v.mp4", "4@N00_5_6.mp4", "7@N00_8_9.avi")
    source = folder.open("didemo")
    assert captions(source) == {"1@N00_2_3": ("a cat it leaves",), "4@N00_5_6": ("a dog.",)}
    assert {(e["start"], e["end"]) for e in examples(source)} == {(None, 30.0)}
    assert source.notes == ("test_data.json: 1 videos are not in test_list.txt, and left out",)

    folder.write("other/didemo_ret_test.json", [{"video": "7@N00_8_9.avi", "caption": ["a", "b"]}])
    os.remove(folder.path / "test_data.json")
    listed = folder.open("didemo")
    assert captions(listed) == {"7@N00_8_9": ("a b",)} and listed[0]["end"] == 30.0


def test_seconds_beyond_the_end_of_a_short_video_take_all_of_it(tmp_path):
    path = write_video(tmp_path / "short.mp4", frames=12)
    spec = ClipSpec(frames=4, size=32, sampling="middle", crop="resize", flip=0.0, views=1)
    clip, info = load_clip(path, spec, np.random.default_rng(0), end=30.0)
    whole, _ = load_clip(path, spec, np.random.default_rng(0))
    assert info.indices == (1, 4, 7, 10) and np.array_equal(clip, whole)


def test_lsmdc_lines_with_dots_in_names(folder):
    clip = "1012_Unbreakable_00.05.16.065-00.05.21.941"
    other = "3009_BATTLE_00.03.07.170-00.03.09.675"
    line = lambda name, text: "\t".join([name, "0", "1", "0", "1", text])
    text = "\n".join(
        [line(clip, 'SOMEONE says "no'), line(other, "He\u2019s late."), line(clip, "again")]
    )
    folder.write("LSMDC16_challenge_1000_publictect.csv", text)
    folder.videos(f"1012_Unbreakable/{clip}.avi", f"{other}.mp4")
    source = folder.open("lsmdc", "test")
    assert captions(source) == {clip: ('SOMEONE says "no', "again"), other: ("He\u2019s late.",)}
    folder.write("LSMDC16_annos_training.csv", '"' + line(other, "In quotes.") + '"')
    assert captions(folder.open("lsmdc", "train")) == {other: ("In quotes.",)}
    folder.write("LSMDC16_challenge_1000_publictect.csv", "a\tb\n")
    with pytest.raises(SourceError, match="entry 1 must have 6 cells between tabs; got 2"):
        folder.open("lsmdc", "test")


def test_activitynet_joins_the_sentences_of_the_first_annotator(folder):
    first = {
        "v_-x1": {"duration": 9.5, "timestamps": [[0, 1], [1, 9]], "sentences": ["One. ", " Two."]}
    }
    second = {"v_-x1": {"duration": 9.5, "timestamps": [[0, 9]], "sentences": ["Other."]}}
    folder.write("captions/val_1.json", first).write("captions/val_2.json", second).videos(
        "-x1.mkv"
    )
    assert captions(folder.open("activitynet", "val")) == {"v_-x1": ("One. Two.",)}
    assert captions(folder.open("activitynet", "validation_2")) == {"v_-x1": ("Other.",)}


def test_vatex_in_two_languages_on_the_listed_clips(folder):
    rows = [
        {"videoID": f"id{i}_00000{i}_00001{i}", "enCap": [f"en {i}", "b"], "chCap": [f"中文 {i}"]}
        for i in range(3)
    ]
    folder.write("vatex_validation_v1.0.json", rows)
    folder.write("test_list.txt", "id2_000002_000012\nid0_000000_000010\n")
    folder.videos(*(f"{row['videoID']}.mp4" for row in rows))
    assert list(captions(folder.open("vatex")).items()) == [
        ("id2_000002_000012", ("en 2", "b")),
        ("id0_000000_000010", ("en 0", "b")),
    ]
    assert captions(folder.open("vatex_zh"))["id0_000000_000010"] == ("中文 0",)
    assert len(folder.open("vatex", "validation")) == 3
    folder.write("test_list.txt", "absent_000002_000012\n")
    with pytest.raises(SourceError, match="entry 1 lacks 'absent_000002_000012'"):
        folder.open("vatex")


def test_vatex_references_of_one_file(folder):
    folder.write("ref_captions.json", {"a_1_2": ["x", "y"], "b_1_2": ["z"]}).write(
        "test_list.txt", "b_1_2\n"
    )
    folder.videos("b_1_2.mp4")
    assert captions(folder.open("vatex")) == {"b_1_2": ("z",)}
    with pytest.raises(
        SourceError, match="captions of its clips are in vatex_validation_v1.0.json"
    ):
        folder.open("vatex_zh")


# As Python 2 wrote it: protocol 0, a text that is not ASCII.
OLD_PICKLE = (
    b"(dp0\nS'-4wsuPCjDBc_5_15'\np1\n(lp2\n(lp3\nS'a'\naS'caf\\xc3\\xa9'\naa(lp4\nS'b'\naas."
)


def msvd_pickle() -> bytes:
    return pickle.dumps(
        {"-4wsuPCjDBc_5_15": [["a", "squirrel"], ["it", "eats"]], "x_1_2": [["no"]]}, 2
    )


def test_msvd_pickle_of_plain_values(folder):
    folder.write("test_list.txt", "-4wsuPCjDBc_5_15\n").write("raw-captions.pkl", msvd_pickle())
    folder.videos("-4wsuPCjDBc_5_15.avi", "x_1_2.avi")
    wanted = {"-4wsuPCjDBc_5_15": ("a squirrel", "it eats")}
    assert captions(folder.open("msvd", "test")) == wanted
    folder.write("raw-captions.json", {"-4wsuPCjDBc_5_15": ["a squirrel", ["it", "eats"]]})
    os.remove(folder.path / "raw-captions.pkl")
    assert captions(folder.open("msvd", "test")) == wanted


def test_msvd_pickle_of_python_2(folder):
    folder.write("test_list.txt", "-4wsuPCjDBc_5_15\n").write("raw-captions.pkl", OLD_PICKLE)
    folder.videos("-4wsuPCjDBc_5_15.avi")
    assert captions(folder.open("msvd")) == {"-4wsuPCjDBc_5_15": ("a caf\u00e9", "b")}


def test_a_pickle_cannot_run_anything(folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by a pickle"),)

    folder.write("test_list.txt", "x\n").videos("x.avi")
    for value, asked in (
        (Runs(), "posix.mkdir"),
        (collections.OrderedDict(x=[["a"]]), "OrderedDict"),
    ):
        folder.write("raw-captions.pkl", pickle.dumps(value))
        with pytest.raises(SourceError, match=f"asks for .*{asked}.*only one of plain"):
            folder.open("msvd")
    assert not (tmp_path / "made by a pickle").exists()
    folder.write("raw-captions.pkl", msvd_pickle()[:-20])
    with pytest.raises(SourceError, match="no pickle"):
        folder.open("msvd")


def test_multiple_choice_keeps_every_candidate_in_its_place(folder):
    choices = ["a", "b", "c", "a", "e"]
    folder.write("msrvtt_mc_test.json", [{"video": "video1.mp4", "caption": choices, "answer": 4}])
    folder.videos("video1.mp4")
    source = folder.open("msrvtt_mc")
    assert captions(source) == {"video1": tuple(choices)} and source[0]["label"] == 4
    os.remove(folder.path / "msrvtt_mc_test.json")
    line = lambda answer: json.dumps(
        {"qid": 0, "clip_name": "video1", "options": choices, "answer": answer}
    )
    folder.write("msrvtt_mc_test.jsonl", line(2) + "\n")
    assert folder.open("msrvtt_mc")[0]["label"] == 2
    for wrong in (5, -1, "2", True):
        folder.write("msrvtt_mc_test.jsonl", line(wrong))
        with pytest.raises(SourceError, match="must have an answer from 0 to 4"):
            folder.open("msrvtt_mc")
    choices[1] = " "
    folder.write("msrvtt_mc_test.jsonl", line(2))
    with pytest.raises(SourceError, match="must have no empty choice"):
        folder.open("msrvtt_mc")


# Recognition ----------------------------------------------------------------------------------------------------------


def class_names(count: int) -> list[str]:
    return [f"action {i:03d}" for i in range(count)]


def test_kinetics_official_list(folder):
    rows = [f'"{name}",id{i:03d},{i},{i + 10},val' for i, name in enumerate(class_names(400))]
    folder.write("validate.csv", KINETICS + "\n".join(reversed(rows)))
    for i in range(398):
        folder.videos(f"action {i:03d}/id{i:03d}_{i:06d}_{i + 10:06d}.mp4")
    folder.videos("id398.webm")
    source = folder.open("k400", "validation")
    assert source.classes == tuple(class_names(400)) and len(source) == 399
    assert labels(source)["id007_000007_000017"] == (7, "action 007")
    assert source[0]["path"].endswith("id398.webm") and source[0]["label"] == 398
    assert source.notes == (
        "benchmark:k400: 1 of 400 videos of validate.csv are not there: action 399/id399_000399_000409. "
        "Results are of the others, and not those of the whole benchmark",
    )


def test_kinetics_needs_all_class_names_to_number_them(folder):
    folder.write("val.csv", KINETICS + "abseiling,abc,0,10,val\n").videos("abc_000000_000010.mp4")
    with pytest.raises(
        SourceError, match="names 1 classes, not 400.*kinetics_400_labels.csv beside it"
    ):
        folder.open("k400")
    names = ["abseiling", *class_names(399)]
    folder.write(
        "kinetics_400_labels.csv", "id,name\n" + "\n".join(f"{i},{n}" for i, n in enumerate(names))
    )
    assert labels(folder.open("k400")) == {"abc_000000_000010": (0, "abseiling")}
    folder.write("val.csv", KINETICS + "absailing,abc,0,10,val\n")
    with pytest.raises(SourceError, match="must have one of the 400 classes; got 'absailing'"):
        folder.open("k400")


@pytest.mark.parametrize("between", [" ", ","])
def test_kinetics_list_of_paths_and_numbers(folder, between):
    lines = [
        f"/disk/of/another/val/{name}.mp4{between}{label}" for name, label in (("a b", 3), ("c", 0))
    ]
    folder.write("val.csv", "\n".join(lines)).videos("val/a b.mkv", "train/c.mp4", "val/c.mp4")
    source = folder.open("k600", "validation")
    assert labels(source) == {"a b": (3, ""), "c": (0, "")} and source.classes == ()
    assert source[1]["path"].endswith("/val/c.mp4"), "the folder of the list decides"
    assert (
        "has class numbers only; put kinetics_600_labels.csv or label_map_k600.txt"
        in source.notes[0]
    )
    folder.write("label_map_k600.txt", "\n".join(class_names(600)))
    named = folder.open("k600", "validation")
    assert labels(named)["a b"] == (3, "action 003") and named.notes == ()
    folder.write("val.csv", f"x.mp4{between}600")
    with pytest.raises(SourceError, match="entry 1 must be a path and a class from 0 to 599"):
        folder.open("k600", "validation")


def test_an_id_that_is_annotated_twice_needs_its_seconds(folder):
    names = "\n".join(class_names(700))
    rows = "action 001,abc,0,10,val\naction 002,abc,50,60,val\naction 003,d,0,10,val\n"
    folder.write("val.csv", KINETICS + rows).write("label_map_k700.txt", names)
    folder.videos("abc.mp4", "abc_000050_000060.mp4", "d.mp4")
    source = folder.open("k700")
    assert labels(source) == {
        "abc_000050_000060": (2, "action 002"),
        "d_000000_000010": (3, "action 003"),
    }


def something(folder) -> list[str]:
    names = [f"Doing {i:03d} with something" for i in range(174)]
    numbers = {name: str((i + 1) % 174) for i, name in enumerate(names)}
    folder.write("labels/labels.json", numbers)
    return [name for name, _ in sorted(numbers.items(), key=lambda item: int(item[1]))]


def test_something_something_templates_are_class_names(folder):
    names = something(folder)
    row = {
        "id": "78687",
        "label": "doing 005 with a potato",
        "template": "Doing 005 with [something]",
    }
    folder.write("labels/validation.json", [row | {"placeholders": ["a potato"]}])
    folder.write("labels/test.json", [{"id": "9"}]).videos("78687.webm", "9.webm")
    source = folder.open("ssv2", "val")
    assert source.classes == tuple(names) and names[6] == "Doing 005 with something"
    assert labels(source) == {"78687": (6, "Doing 005 with something")}
    assert source[0]["captions"] == ("doing 005 with a potato",)
    assert source[0]["flip"] is False, "left and right are in the labels"
    with pytest.raises(SourceError, match="those of the test are in test-answers.csv"):
        folder.open("ssv2", "test")
    folder.write("labels/test-answers.csv", "9;Doing 000 with something\n")
    assert labels(folder.open("ssv2", "test")) == {"9": (1, "Doing 000 with something")}


def test_ucf101_lists(folder):
    folders = [f"Act{i:03d}Now" for i in range(100)] + ["HandstandPushups"]
    folder.write(
        "classInd.txt", "\n".join(f"{i + 1} {name}" for i, name in enumerate(folders)) + "\n"
    )
    odd = "HandstandPushups/v_HandStandPushups_g01_c01.avi"  # as published: two spellings
    folder.write("testlist01.txt", f"{odd}\nAct002Now/v_Act002Now_g01_c01.avi\n")
    folder.write("trainlist01.txt", "Act002Now/v_Act002Now_g08_c01.avi 3\n")
    folder.videos(odd, "v_Act002Now_g01_c01.mp4", "v_Act002Now_g08_c01.mp4")
    source = folder.open("ucf101", "test")
    assert [e["label"] for e in examples(source)] == [100, 2] and source.classes == tuple(folders)
    assert labels(folder.open("ucf101", "train")) == {"v_Act002Now_g08_c01": (2, "Act002Now")}
    with pytest.raises(SourceError, match="none called testlist02.txt"):
        folder.open("ucf101", "test_2")


def test_hmdb51_marks(folder):
    folders = ["brush_hair", *(f"class_{i:02d}" for i in range(50))]
    for name in folders:
        lines = f"{name}_one_0.avi 1 \n{name}_(two)#1_0.avi 2 \n{name}_three_0.avi 0 \n"
        folder.write(f"splits/{name}_test_split1.txt", lines)
        folder.videos(f"{name}/{name}_(two)#1_0.avi", f"{name}/{name}_one_0.avi")
    source = folder.open("hmdb51", "test")
    assert len(source) == 51 and source.classes == tuple(folders)
    assert labels(source)["class_03_(two)#1_0"] == (4, "class_03")
    assert {e["id"][-6:] for e in examples(folder.open("hmdb51", "train"))} == {"_one_0"}
    os.remove(folder.path / "splits/class_07_test_split1.txt")
    with pytest.raises(SourceError, match="must be 51 files .*_test_split1.txt; got 50"):
        folder.open("hmdb51", "test")


def test_classes_of_the_training_data_count(folder):
    names = something(folder)
    folder.write("validation.json", [{"id": "1", "template": "Doing 005 with [something]"}]).videos(
        "1.webm"
    )
    wanted = [name.upper().replace(" ", "_") for name in reversed(names)]
    source = folder.open("ssv2", "validation", classes=wanted)
    assert source.classes == tuple(wanted)
    assert labels(source) == {"1": (173 - 6, "DOING_005_WITH_SOMETHING")}
    with pytest.raises(
        SourceError, match="must be one of the 2 classes of the training data.*data.train empty"
    ):
        folder.open("ssv2", "validation", classes=["run", "jump"])


# Files ----------------------------------------------------------------------------------------------------------------


def listed(folder, count: int) -> Folder:
    rows = [{"video": f"v{i}.mp4", "caption": f"text {i}"} for i in range(count)]
    return folder.write("msrvtt_test_1k.json", rows)


def test_a_few_absent_videos_are_told(folder):
    listed(folder, 20).videos(*(f"v{i}.mp4" for i in range(12)))
    source = folder.open("msrvtt_1k")
    assert len(source) == 12
    assert source.notes == (
        "benchmark:msrvtt_1k: 8 of 20 videos of msrvtt_test_1k.json are not there: v12.mp4, v13.mp4, v14.mp4, "
        "v15.mp4, v16.mp4 and 3 more. Results are of the others, and not those of the whole benchmark",
    )


def test_most_videos_absent_is_an_error(folder, tmp_path):
    listed(folder, 20).videos(*(f"v{i}.mp4" for i in range(9)))
    with pytest.raises(SourceError) as error:
        folder.open("msrvtt_1k")
    for part in (
        "of 20 that msrvtt_test_1k.json names, 11 are not",
        "holds 9 video files",
        "First: v9.mp4",
    ):
        assert part in str(error.value)
    elsewhere = Folder(tmp_path / "elsewhere").videos(*(f"v{i}.webm" for i in range(9, 20)))
    source = folder.open("msrvtt_1k", roots=[str(elsewhere.path)])
    assert len(source) == 20 and source.notes == ()
    assert source[19]["path"] == str(elsewhere.path / "videos/v19.webm")


def test_a_video_that_is_there_twice_is_told(folder):
    listed(folder, 1).videos("deep/v0.webm", "v0.mp4")
    source = folder.open("msrvtt_1k")
    assert source[0]["path"].endswith("videos/v0.mp4")
    assert source.notes == (
        "benchmark:msrvtt_1k: 1 videos are there more than once (first: v0.mp4); the one least deep is read",
    )


def test_videos_behind_a_link_need_their_folder_allowed(folder, tmp_path):
    real = Folder(tmp_path / "disk").videos("v0.mp4", "v1.mp4")
    listed(folder, 2)
    (folder.path / "linked").symlink_to(real.path / "videos")
    with pytest.raises(
        SourceError, match=f"2 are not .2 symlink.*--config.data.roots=.*{real.path}"
    ):
        folder.open("msrvtt_1k")
    source = folder.open("msrvtt_1k", roots=[str(real.path)])
    assert len(source) == 2 and source.notes == (), "found by both ways, and one file"
    assert pathlib.Path(source[1]["path"]).samefile(real.path / "videos/v1.mp4")


def test_the_absence_of_a_file_names_all_that_would_do(folder):
    folder.videos("v0.mp4")
    with pytest.raises(SourceError) as error:
        folder.open("msvd", "test")
    for name in ("test_list.txt", "msvd_ret_test.json", str(folder.path), "CLIP4Clip", "VindLU"):
        assert name in str(error.value)


def test_two_files_that_differ_are_an_error(folder):
    listed(folder, 1).videos("v0.mp4")
    folder.write("a/test_list.txt", "1").write("b/test_list.txt", "2").write(
        "raw-captions.json", {}
    )
    with pytest.raises(
        SourceError, match="must be there once; got .*a/test_list.txt and .*b/test_list.txt"
    ):
        folder.open("msvd")
    folder.write("b/test_list.txt", "1")
    with pytest.raises(SourceError, match="entry 1 lacks '1'"):
        folder.open("msvd")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "no JSON"),
        ("{}", "outermost value must be a list; got dict"),
        ('[{"video": "v0.mp4"}]', "entry 1 lacks 'caption'"),
        ('[{"caption": "x"}]', "entry 1 lacks 'video'"),
        (
            '[{"video": "v0.mp4", "caption": 3}]',
            "entry 1 must have a text or a list of texts; got '3'",
        ),
        ("[3]", "entry 1"),
    ],
)
def test_a_broken_file_says_what_is_wrong(folder, content, said):
    folder.write("msrvtt_test_1k.json", content).videos("v0.mp4")
    with pytest.raises(SourceError, match=re.escape(said)) as error:
        folder.open("msrvtt_1k")
    assert "Take it as published: msrvtt_data.zip" in str(error.value)


def test_an_empty_file_is_an_error(folder):
    folder.write("msrvtt_test_1k.json", "[]").videos("v0.mp4")
    with pytest.raises(SourceError, match="must annotate at least one video"):
        folder.open("msrvtt_1k")


def test_names_splits_and_folders_that_are_not_there(folder):
    listed(folder, 1).videos("v0.mp4")
    with pytest.raises(SourceError, match='Unknown benchmark "msrvt_1k".*Did you mean "msrvtt_1k"'):
        open_source(f"benchmark:msrvt_1k:{folder.path}")
    with pytest.raises(SourceError, match="must say which folder.*benchmark:msrvtt_1k:FOLDER"):
        open_source("benchmark:msrvtt_1k")
    with pytest.raises(SourceError, match="must be a folder; got /no/such"):
        open_source("benchmark:msrvtt_1k:/no/such")
    with pytest.raises(NoSuchSplit, match='has no split "val".*data.eval_split=test'):
        folder.open("msrvtt_1k", "val")


def test_the_source_is_the_same_wherever_it_lies(folder, tmp_path):
    listed(folder, 3).videos("v0.mp4", "v1.mp4", "v2.mp4")
    other = Folder(tmp_path / "moved")
    listed(other, 3).videos("v0.mp4", "v1.mp4", "v2.mp4")
    one, two = folder.open("msrvtt_1k"), other.open("msrvtt_1k")
    assert one.fingerprint() == two.fingerprint()
    assert pickle.loads(pickle.dumps(one))[2]["captions"] == ("text 2",)
    listed(other, 3).write("msrvtt_test_1k.json", [{"video": "v0.mp4", "caption": "else"}])
    assert other.open("msrvtt_1k").fingerprint() != one.fingerprint()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a/b.avi.mp4", "b"),
        ("b.", "b"),
        ("b.avi.", "b"),
        ("c.MP4", "c"),
        ("M_00.03.07.170-00.03.09.675", "M_00.03.07.170-00.03.09.675"),
        ("M_00.03.07.170-00.03.09.675.avi", "M_00.03.07.170-00.03.09.675"),
        ("a\\b.mp4", "b"),
        ("-dash_1_2", "-dash_1_2"),
        (".mp4", ".mp4"),
    ],
)
def test_stem(name, wanted):
    assert stem(name) == wanted


def test_every_benchmark_can_say_what_it_needs(tmp_path):
    for name in BENCHMARKS:
        benchmark = BENCHMARKS.get(name)
        for split in benchmark.splits():
            with pytest.raises(SourceError) as error:
                open_source(f"benchmark:{name}:{tmp_path}", split=split)
            assert all(file in str(error.value) for file in benchmark.file_names(split))
        assert benchmark.split in benchmark.splits()
