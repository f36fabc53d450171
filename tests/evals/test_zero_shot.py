"""Zero-shot classification on towers that are known, and the prompts."""

import numpy as np
import pytest
from fake_towers import Texts, given_of, towers_of, unit

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS, prompts

CLASSES = ("brush_hair", "CartWheel", "play YoYo", "TRX", "Pushing [something] off", "clap", "dive")
WORDS = ("brush hair", "cart wheel", "play YoYo", "TRX", "Pushing something off", "clap", "dive")


def case(templates=prompts.ACTIONS, count=29, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(CLASSES), 5))
    label = rng.integers(0, len(CLASSES), count)
    features = centres[label] + noise * rng.normal(size=(count, 5))
    vectors = {
        template.replace("{}", word): centre + 0.5 * rng.normal(size=5)
        for word, centre in zip(WORDS, centres)
        for template in templates
    }
    return features, label, vectors


def run(given, **options):
    return dict(EVALUATORS.get("zero_shot")(given, **options).run(1.0, 0))


@pytest.mark.parametrize("mean", ["embedding", "cosine"])
def test_scores_are_those_of_a_plain_loop(mean):
    features, label, vectors = case()
    label[3] = -1  # not known
    valid = np.arange(29) != 5
    towers = towers_of(Texts(vectors))
    given = given_of(features, labels=label, valid=valid, towers=towers, classes=CLASSES)
    found = run(given, examples=29, mean=mean, text_batch=30)
    table = unit(np.stack(list(vectors.values()))).reshape(7, 16, 5)
    scores = np.einsum("vp,ctp->vc", unit(features), table) / 16
    if mean == "embedding":
        scores /= np.linalg.norm(table.mean(1), axis=1)
    kept = valid & (label >= 0)
    ranks = np.array([(s > s[c]).sum() for s, c in zip(scores[kept], label[kept])])
    assert found["top1"] == pytest.approx(np.mean(ranks == 0)) and 0.3 < found["top1"] < 1
    assert found["top5"] == pytest.approx(np.mean(ranks < 5))
    assert found["mean_top1_top5"] == pytest.approx((found["top1"] + found["top5"]) / 2)
    own = [np.mean(ranks[label[kept] == c] == 0) for c in np.unique(label[kept])]
    assert found["mean_class"] == pytest.approx(np.mean(own))
    assert found["chance"] == pytest.approx(1 / 7) and found["videos"] == kept.sum() == 27


def test_devices_change_nothing_and_views_are_averaged():
    features, label, vectors = case(("{}",), count=32)
    towers = towers_of(Texts(vectors))
    given = given_of(features, labels=label, towers=towers, classes=CLASSES)
    want = run(given, examples=32, templates="none")
    with sharding.use(sharding.make_mesh()):
        assert run(given, examples=32, templates="none") == want
    twice = given_of(features, labels=np.repeat(label[::2], 2), towers=towers, classes=CLASSES)
    found = run(twice, examples=32, templates="none", clips=2)
    scores = unit(features) @ unit(np.stack(list(vectors.values()))).T
    scores = scores.reshape(16, 2, 7).mean(1)
    assert found["videos"] == 16
    assert found["top1"] == pytest.approx(np.mean(scores.argmax(1) == label[::2]))


def test_a_model_that_says_the_same_of_all_is_at_chance():
    features, label, vectors = case(("{}",))
    label[:] = 0  # a rule that prefers the first class would be right always
    same = Texts(dict.fromkeys(vectors, np.ones(5)))
    given = given_of(features, labels=label, towers=towers_of(same), classes=CLASSES)
    found = run(given, examples=29, templates="none")
    assert found["top1"] == pytest.approx(1 / 7) and found["top5"] == pytest.approx(5 / 7)


def test_sixteen_templates_for_actions():
    assert len(set(prompts.ACTIONS)) == 16 == len(prompts.templates("actions"))
    assert all(t.count("{}") == 1 for t in prompts.ACTIONS)
    assert prompts.templates("none") == ("{}",)
    assert prompts.fill("see {}.", "a {} b") == "see a {} b."


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("ein Video von {}\n\n{} im Bild\n", encoding="utf-8")
    assert prompts.templates(str(file)) == ("ein Video von {}", "{} im Bild")
    for text, said in (
        ("{} and {}", "'{} and {}'"),
        ("nothing", "'nothing'"),
        ("", "an empty file"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="must have '{}' once") as caught:
            prompts.templates(str(file))
        assert f"got {said}" in str(caught.value)
    with pytest.raises(UserError, match='got templates=.action.. Did you mean "actions"'):
        prompts.templates("action")


@pytest.mark.parametrize("name, said", zip(CLASSES, WORDS))
def test_class_names_become_words(name, said):
    assert prompts.words(name) == said


@pytest.mark.parametrize(
    "name, said",
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("ride-bike", "ride bike"),
        ("打", "打"),
    ],
)
def test_other_names_too(name, said):
    assert prompts.words(name) == said


def test_what_is_missing_is_named():
    features, label, vectors = case(("{}",))
    towers = towers_of(Texts(vectors))
    wrong = [
        (dict(towers=towers), {}, "needs the names of the classes"),
        (dict(classes=CLASSES), {}, "'zero_shot' needs a model of video and text"),
        (dict(towers=towers, classes=CLASSES), dict(mean="cosin"), 'Did you mean "cosine"'),
        (dict(towers=towers, classes=CLASSES), dict(modality="audio"), "that embeds audio"),
    ]
    for fields, options, said in wrong:
        with pytest.raises(UserError, match=said):
            EVALUATORS.get("zero_shot")(given_of(features, **fields), examples=9, **options)
    unlabelled = given_of(features, towers=towers, classes=CLASSES)
    with pytest.raises(UserError, match="needs held-out videos with labels; got none"):
        run(unlabelled, examples=9, templates="none")
