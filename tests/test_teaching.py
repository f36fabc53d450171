"""Teachers around a run: a later stage's missing one is named before anything is written; evaluations load late."""

import types

import pytest
from conftest import REPOSITORY
from data.video_files import write

from invideo_jax import config as config_lib
from invideo_jax import evaluate, run, runtime, teaching
from invideo_jax.errors import UserError

RECIPE = '''"""A stage without a teacher, then one with."""

from configs.internvideo2 import stage1_1b

def get_config(arg=None):
    c = stage1_1b.get_config("smoke")
    c.stages.second = c.stages.aligned.copy_and_resolve_references()
    c.stages.second.init.source = ""
    c.stage_order = ("aligned", "second")
    return c
'''


def test_a_teacher_of_a_later_stage_must_be_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "videos").mkdir()
    for i in range(8):
        write(str(tmp_path / "videos" / f"{i}.mp4"), frames=8, size=(32, 32))
    recipe = config_lib.load(str(tmp_path / "recipe.py"), [])
    recipe.config.data.train = str(tmp_path / "videos")
    recipe.config.stages.second.teachers.mae.source = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="stages.second.teachers.mae.source must .*not there"):
        run.Run(recipe, tmp_path / "work")._look()
    assert not (tmp_path / "work").exists()


def test_an_error_while_loading_goes_to_all_processes(monkeypatch):
    told = []
    monkeypatch.setattr(runtime, "fail_together", told.append)

    def broken(*_, **__):
        raise UserError("gone")

    monkeypatch.setattr(teaching, "place", broken)
    program = types.SimpleNamespace(teacher=types.SimpleNamespace(models={}, apply=None), kept=None)

    def together(action):
        run._on_all(action)
        raise UserError("told")

    with pytest.raises(UserError, match="told"):
        teaching.start(program, None, together=together)
    assert [str(error) for error in told] == ["gone"]


def test_an_evaluation_loads_the_teacher_when_one_is_asked(monkeypatch):
    loads = []

    def start(program, mesh):
        loads.append(program)
        return lambda batch: batch | {"mae": 1}, "0123"

    monkeypatch.setattr(teaching, "start", start)
    teach = evaluate._teach("program", None, "0123")
    assert not loads
    assert teach({}) == teach({}) == {"mae": 1} and loads == ["program"]
    other = evaluate._teach("program", None, "4567")
    with pytest.raises(UserError, match="digest 4567.; got 0123"):
        other({})
