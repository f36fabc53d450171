"""What is said of a scene: captions of what is seen and heard in varied wording, and the words of a narrator with times."""

import numpy as np

from invideo_jax.data.scenes import vocabulary
from invideo_jax.data.scenes.scene import Look, Scene

# label -> (verb, -ing form, rest). A pair label may use {other}.
_PHRASES = {
    "moves left": [
        ("moves", "moving", "to the left"),
        ("slides", "sliding", "left"),
        ("drifts", "drifting", "leftwards"),
        ("glides", "gliding", "towards the left"),
        ("travels", "travelling", "left across the picture"),
    ],
    "moves right": [
        ("moves", "moving", "to the right"),
        ("slides", "sliding", "right"),
        ("drifts", "drifting", "rightwards"),
        ("glides", "gliding", "towards the right"),
        ("travels", "travelling", "right across the picture"),
    ],
    "moves up": [
        ("moves", "moving", "up"),
        ("rises", "rising", "steadily"),
        ("floats", "floating", "upwards"),
        ("climbs", "climbing", "towards the top"),
        ("drifts", "drifting", "up the picture"),
    ],
    "moves down": [
        ("moves", "moving", "down"),
        ("sinks", "sinking", "steadily"),
        ("drifts", "drifting", "downwards"),
        ("descends", "descending", "towards the bottom"),
        ("glides", "gliding", "down the picture"),
    ],
    "turns clockwise": [
        ("turns", "turning", "clockwise"),
        ("spins", "spinning", "clockwise in place"),
        ("rotates", "rotating", "clockwise"),
        ("turns", "turning", "slowly clockwise"),
    ],
    "turns anticlockwise": [
        ("turns", "turning", "anticlockwise"),
        ("spins", "spinning", "anticlockwise in place"),
        ("rotates", "rotating", "counterclockwise"),
        ("turns", "turning", "slowly anticlockwise"),
    ],
    "circles clockwise": [
        ("circles", "circling", "clockwise"),
        ("orbits", "orbiting", "clockwise around an empty spot"),
        ("loops", "looping", "round clockwise"),
        ("goes round", "going round", "clockwise in a ring"),
    ],
    "circles anticlockwise": [
        ("circles", "circling", "anticlockwise"),
        ("orbits", "orbiting", "anticlockwise around an empty spot"),
        ("loops", "looping", "round anticlockwise"),
        ("goes round", "going round", "counterclockwise in a ring"),
    ],
    "grows": [
        ("grows", "growing", "steadily"),
        ("gets", "getting", "bigger and bigger"),
        ("swells", "swelling", "to a larger size"),
        ("expands", "expanding", "bit by bit"),
    ],
    "shrinks": [
        ("shrinks", "shrinking", "steadily"),
        ("gets", "getting", "smaller and smaller"),
        ("contracts", "contracting", "to a smaller size"),
        ("dwindles", "dwindling", "bit by bit"),
    ],
    "bounces": [
        ("bounces", "bouncing", "on the spot"),
        ("bounces", "bouncing", "like a rubber ball"),
        ("hops", "hopping", "again and again"),
        ("keeps bouncing", "bouncing", "off an unseen floor"),
    ],
    "appears": [
        ("appears", "appearing", "all at once"),
        ("suddenly appears", "suddenly appearing", ""),
        ("shows itself", "appearing", "out of nowhere"),
        ("turns visible", "appearing", "in the middle of the clip"),
    ],
    "disappears": [
        ("disappears", "disappearing", "all at once"),
        ("suddenly vanishes", "suddenly vanishing", ""),
        ("vanishes", "vanishing", "without a trace"),
        ("is there and then is gone", "disappearing", "for good"),
    ],
    "collides": [
        ("collides", "colliding", "with {other}"),
        ("crashes", "crashing", "into {other} and is thrown back"),
        ("bumps", "bumping", "into {other}"),
        ("and {other} crash", "and {other} crashing", "into each other"),
        ("and {other} collide", "and {other} colliding", "and spring apart"),
    ],
    "passes": [
        ("passes", "passing", "{other} without touching it"),
        ("slips past", "slipping past", "{other}"),
        ("crosses paths", "crossing paths", "with {other}"),
        ("and {other} pass", "and {other} passing", "each other"),
    ],
}

_SHAPE_NOUNS = {s: (s,) for s in vocabulary.SHAPES} | {
    "circle": ("circle", "disc"),
    "moon": ("moon", "crescent"),
}
_TEXTURE_FORMS = {  # adjectives, nouns after 'with'
    "plain": (("", "plain"), ()),
    "striped": (("striped",), ("stripes",)),
    "dotted": (("dotted", "spotted"), ("dots", "spots")),
    "checked": (("checked", "chequered"), ("checks",)),
}
_SOUND_NAMES = {
    "hum": ("a hum", "a steady drone", "humming"),
    "rising tone": ("a rising tone", "a tone that rises"),
    "falling tone": ("a falling tone", "a tone that falls"),
    "ticking": ("ticking", "quick ticks"),
    "whirr": ("a whirr", "a wavering tone"),
    "thud": ("a thud at every landing", "thumps"),
    "chime": ("a chime", "a bell"),
    "knock": ("a knock", "a loud bang"),
    "whoosh": ("a whoosh", "a swish"),
}
_WITH_SOUND = (
    "{text} with {sound}",
    "{text} to the sound of {sound}",
    "{sound} can be heard as {text}",
    "{text} and one hears {sound}",
)
_SOUND_ALONE = (
    "{sound}",
    "the sound of {sound}",
    "{sound} can be heard",
    "one hears {sound}",
    "you can hear {sound}",
    "a recording of {sound}",
)
_SILENT = ("{text}", "{text} in silence", "{text} without a sound")
_INSTANT = ("appears", "disappears")  # 'is appearing' would be no English for a sudden event
_LEADS = ("look", "here", "now", "see", "and now")


def captions(scene: Scene) -> dict[str, list[str]]:
    """What can be said of a clip, by kind.

    Returns:
        `video`: four of what is seen: full, with surroundings, short, full in other words. All name shape, colour and motion; all
            but the short one name the texture, unless it is plain.
        `audio`: one or two of what is heard; none of a silent clip.
        `fused`: one of both; of a silent clip one that says so, or only what is seen.
    """
    rng = scene.rng(2)
    seen = [_sentence(scene, rng), _in_surroundings(scene, rng), _short(scene, rng)]
    extra = _sentence(scene, rng)
    for _ in range(5):
        if extra != seen[0]:
            break
        extra = _sentence(scene, rng)
    seen.append(extra)
    both = _sentence(scene, rng)
    if scene.sound == vocabulary.SILENT:
        return {"video": seen, "audio": [], "fused": [_pick(rng, _SILENT).format(text=both)]}
    names = _SOUND_NAMES[scene.sound]
    fused = _pick(rng, _WITH_SOUND).format(text=both, sound=_pick(rng, names))
    forms = list(_SOUND_ALONE)
    heard = [
        forms.pop(rng.integers(len(forms))).format(sound=_pick(rng, names))
        for _ in range(1 + int(rng.integers(2)))
    ]
    return {"video": seen, "audio": heard, "fused": [fused]}


def transcript(scene: Scene, seconds: float) -> tuple[str, list[list[float]]]:
    """What a narrator says during the clip: one short sentence.

    Returns:
        (the words, [[start, end] in seconds of each word]); speech lies inside the clip.
    """
    rng = scene.rng(3)
    look = scene.actors[0].look
    verb, _, rest = _pick(rng, _PHRASES[scene.motion])
    other = f"the {scene.actors[1].look.colour} one" if scene.pair else ""
    noun = f"the {look.colour} {_pick(rng, _SHAPE_NOUNS[look.shape])}"
    text = " ".join(f"{_pick(rng, _LEADS)} {noun} {verb} {rest}".format(other=other).split())
    words = text.split()
    # A word takes time in proportion to its letters, a pause counts two; 15 letters a second is
    # quick speech, and faster only where the clip is too short for it.
    letters = np.array([len(w) + 2 for w in words], np.float64)
    lead = 0.05 * seconds
    length = min(letters.sum() / 15, seconds - 2 * lead)
    ends = lead + np.cumsum(letters) * length / letters.sum()
    starts = ends - (letters - 2) * length / letters.sum()
    return text, [[round(float(a), 3), round(float(b), 3)] for a, b in zip(starts, ends)]


def _sentence(scene: Scene, rng: np.random.Generator) -> str:
    """'a red striped star slides to the left' or '... is sliding to the left'."""
    verb, ing, rest = _pick(rng, _PHRASES[scene.motion])
    if rng.uniform() < 0.3 and " " not in verb and scene.motion not in _INSTANT:
        verb = f"is {ing}"
    return _fill(scene, rng, f"{_noun(rng, scene.actors[0].look)} {verb} {rest}")


def _short(scene: Scene, rng: np.random.Generator) -> str:
    """'red star sliding left'."""
    look = scene.actors[0].look
    _, ing, rest = _pick(rng, _PHRASES[scene.motion])
    return _fill(scene, rng, f"{look.colour} {_pick(rng, _SHAPE_NOUNS[look.shape])} {ing} {rest}")


def _in_surroundings(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence and what is around: the backdrop or a bystander."""
    text = _sentence(scene, rng)
    bystanders = scene.actors[2 if scene.pair else 1 :]
    if bystanders and rng.uniform() < 0.6:
        noun = _noun(rng, _pick(rng, bystanders).look)
        return text + _pick(rng, (f" while {noun} stays still", f", next to {noun} at rest"))
    backdrop = f"{scene.backdrop} {scene.pattern}"
    return _pick(
        rng,
        (f"{text} over {backdrop}", f"{text} in front of {backdrop}", f"over {backdrop} {text}"),
    )


def _noun(rng: np.random.Generator, look: Look) -> str:
    """'a red striped star', 'a striped red star', 'a red star with stripes'."""
    adjectives, nouns = _TEXTURE_FORMS[look.texture]
    shape = _pick(rng, _SHAPE_NOUNS[look.shape])
    if nouns and rng.uniform() < 0.4:
        return _article(f"{look.colour} {shape} with {_pick(rng, nouns)}")
    parts = [_pick(rng, adjectives), look.colour]
    if look.texture != "plain" and rng.uniform() < 0.5:
        parts.reverse()
    return _article(" ".join([*filter(None, parts), shape]))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _fill(scene: Scene, rng: np.random.Generator, text: str) -> str:
    other = _noun(rng, scene.actors[1].look) if scene.pair else ""
    return " ".join(text.format(other=other).split())


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]
