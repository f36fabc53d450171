"""Durations and the place of a step in the run."""

import pytest

from invideo_jax import stages
from invideo_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("100 steps", 100),
        (100, 100),
        ("100", 100),
        ("1_000 examples", 31),  # 1000 / 32, rounded down
        ("1e3 examples", 31),
        ("2 epochs", 62),  # 2 * 1000 / 32
        ("1 epoch", 31),
        ("0.5 epochs", 15),
        ("10%", 20),
        ("10 percent", 20),
        ("0.001%", 1),  # a positive amount is at least one step
        ("0 steps", 0),
    ],
)
def test_duration_in_steps(text, steps):
    duration = stages.Duration.parse(text)
    assert duration.steps(batch_size=32, epoch_examples=1000, whole=200) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ten steps", "must be an amount and a unit"),
        ("-5 steps", "must be an amount and a unit"),
        ("5 epoks", 'Did you mean "epochs"'),
        ("120%", "at most 100 %"),
        ("nan", "must be an amount and a unit"),
    ],
)
def test_duration_errors_name_the_key(text, message):
    with pytest.raises(UserError, match=message) as error:
        stages.Duration.parse(text, name="stages.masked.length")
    assert "stages.masked.length" in str(error.value)


def test_duration_needs_what_it_is_a_share_of():
    with pytest.raises(UserError, match="size of the training set"):
        stages.Duration.parse("2 epochs").steps(batch_size=8, epoch_examples=None, whole=10)
    with pytest.raises(UserError, match="needs a whole"):
        stages.Duration.parse("20%").steps(batch_size=8, epoch_examples=10, whole=None)


def three_stages():
    return stages.plan(
        ("masked", "contrastive", "generative"),
        {"generative": "25%", "masked": "10 steps", "contrastive": "64 examples"},
        batch_sizes={"masked": 8, "contrastive": 16, "generative": 4},
        epoch_examples={"masked": 100, "contrastive": 100, "generative": None},
        total_steps=40,
    )


def test_plan_keeps_the_given_order_and_places_stages():
    placed = [(s.name, s.first, s.steps, s.last) for s in three_stages()]
    assert placed == [("masked", 0, 10, 10), ("contrastive", 10, 4, 14), ("generative", 14, 10, 24)]


@pytest.mark.parametrize(
    ("step", "name", "stage_step"),
    [
        (0, "masked", 0),
        (9, "masked", 9),
        (10, "contrastive", 0),
        (11, "contrastive", 1),
        (13, "contrastive", 3),
        (14, "generative", 0),
        (23, "generative", 9),
        (24, "generative", 10),  # the run is complete
        (99, "generative", 10),
    ],
)
def test_stage_at_every_boundary(step, name, stage_step):
    stage, inside = stages.stage_at(three_stages(), step)
    assert (stage.name, inside) == (name, stage_step)


def test_plan_errors():
    arguments = dict(batch_sizes={"masked": 8}, epoch_examples={"masked": 100})
    with pytest.raises(UserError, match="at least one stage"):
        stages.plan((), {"masked": 1}, **arguments)
    with pytest.raises(UserError, match='"maskd".*Did you mean "masked"'):
        stages.plan(("maskd",), {"masked": 1}, **arguments)
    with pytest.raises(UserError, match="each stage once"):
        stages.plan(("masked", "masked"), {"masked": 1}, **arguments)
    with pytest.raises(UserError, match="at least one step"):
        stages.plan(("masked",), {"masked": "0 steps"}, **arguments)
    with pytest.raises(ValueError, match="must not be negative"):
        stages.stage_at(three_stages(), -1)


def test_random_key_depends_on_the_name_alone():
    first, second = three_stages()[0], stages.Stage("masked", 500, 3, 2)
    assert first.key == second.key == 1319629514
    assert first.key != three_stages()[1].key
    assert 0 <= first.key < 2**31
