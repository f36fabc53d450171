"""The names the built-in dataset is made of, and how a text is searched for them."""

import re

LABELS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "turns clockwise",
    "turns anticlockwise",
    "circles clockwise",
    "circles anticlockwise",
    "grows",
    "shrinks",
    "bounces",
    "appears",
    "disappears",
    "collides",
    "passes",
)
STILL = "stays still"  # what bystanders do; not a label

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "arrow")
TEXTURES = ("plain", "striped", "dotted", "checked")

# sRGB, 0..255; saturated, so that they stand out from the muted backdrops.
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 40),
    "green": (40, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 215),
    "purple": (130, 50, 180),
    "pink": (250, 120, 180),
    "white": (245, 245, 245),
    "black": (28, 28, 32),
}

# name -> the two colours between which the pattern runs
BACKDROPS = {
    "slate": ((88, 100, 116), (128, 141, 156)),
    "sand": ((186, 168, 134), (156, 138, 106)),
    "moss": ((104, 122, 92), (140, 156, 124)),
    "clay": ((160, 122, 106), (128, 98, 86)),
    "mauve": ((134, 116, 142), (164, 148, 170)),
}
PATTERNS = ("clouds", "waves", "bands", "tiles")

# The sound of each motion; two motions that one sound leaves open share it on purpose.
SOUNDS = {
    "moves left": "hum",
    "moves right": "hum",
    "moves up": "rising tone",
    "moves down": "falling tone",
    "turns clockwise": "ticking",
    "turns anticlockwise": "ticking",
    "circles clockwise": "whirr",
    "circles anticlockwise": "whirr",
    "grows": "falling tone",
    "shrinks": "rising tone",
    "bounces": "thud",
    "appears": "chime",
    "disappears": "chime",
    "collides": "knock",
    "passes": "whoosh",
}
SILENT = "none"

_SHAPE_WORDS = {
    "circle": "circles?|discs?",
    "square": "squares?",
    "triangle": "triangles?",
    "star": "stars?",
    "heart": "hearts?",
    "cross": "cross|crosses",
    "moon": "moons?|crescents?",
    "arrow": "arrows?",
}
_TEXTURE_WORDS = {
    "plain": "plain",
    "striped": "striped|stripes",
    "dotted": "dotted|dots|spotted|spots",
    "checked": "checked|chequered|checks",
}
_TURN = r"(turn|turns|turning|spin|spins|spinning|rotate|rotates|rotating)"
_CIRCLE = r"(circles|circling|orbits|orbiting|loops|looping|goes round|going round)"
_ANTI = r"(anticlockwise|counterclockwise)"
_MOTION_WORDS = {
    "moves left": r"\bleft(wards)?\b",
    "moves right": r"\bright(wards)?\b",
    "moves up": r"\b(up|upwards|rises|rising|climbs|climbing)\b",
    "moves down": r"\b(down|downwards|sinks|sinking|descends|descending)\b",
    "turns clockwise": rf"\b{_TURN}( \w+)? clockwise\b",
    "turns anticlockwise": rf"\b{_TURN}( \w+)? {_ANTI}\b",
    "circles clockwise": rf"\b{_CIRCLE}( \w+)? clockwise\b",
    "circles anticlockwise": rf"\b{_CIRCLE}( \w+)? {_ANTI}\b",
    "grows": r"\b(grows|growing|bigger|larger|swells|swelling|expands|expanding)\b",
    "shrinks": r"\b(shrinks|shrinking|smaller|contracts|contracting|dwindles|dwindling)\b",
    "bounces": r"\b(bounces|bouncing|hops|hopping)\b",
    "appears": r"\b(appears|appearing|shows itself|out of nowhere|turns visible)\b",
    "disappears": r"\b(disappears|disappearing|vanishes|vanishing|is gone)\b",
    "collides": r"\b(collides?|colliding|crash|crashes|crashing|bumps?|bumping|collision)\b",
    "passes": r"\b(pass|passes|passing|slips? past|slipping past|crosses paths|crossing paths)\b",
}
_SOUND_WORDS = {
    "hum": "hum|humming|drone",
    "rising tone": r"rising (tone|pitch)|(tone|pitch) that rises|(tone|pitch) goes higher",
    "falling tone": r"falling (tone|pitch)|(tone|pitch) that falls|(tone|pitch) goes lower",
    "ticking": "ticking|ticks|clicking",
    "whirr": "whirr|whirring|wavering tone",
    "thud": "thuds?|thumps?",
    "chime": "chimes?|bell",
    "knock": "knock|bang",
    "whoosh": "whoosh|swish",
}


def _whole_words(table: dict[str, str]) -> dict[str, re.Pattern]:
    return {name: re.compile(rf"\b(?:{words})\b") for name, words in table.items()}


# What is removed before the next attribute is searched for: sounds name directions ('rising'),
# 'crosses paths' and 'circles clockwise' are motions, not shapes.
_PATTERNS = {
    "sound": _whole_words(_SOUND_WORDS),
    "motion": {name: re.compile(words) for name, words in _MOTION_WORDS.items()},
    "shape": _whole_words(_SHAPE_WORDS),
    "colour": {name: re.compile(rf"\b{name}\b") for name in COLOURS},
    "texture": _whole_words(_TEXTURE_WORDS),
}


def mentions(text: str) -> dict[str, frozenset[str]]:
    """Says which sounds, motions, shapes, colours and textures a caption names.

    Meant for captions of this dataset, written or generated; other wording is not understood.

    Returns:
        attribute -> names found, under the keys sound, motion, shape, colour, texture.
    """
    text = re.sub(r"[^a-z ]+", " ", text.lower())
    text = re.sub(r" +", " ", text)
    found = {}
    for attribute, patterns in _PATTERNS.items():
        found[attribute] = frozenset(n for n, pattern in patterns.items() if pattern.search(text))
        if attribute in ("sound", "motion"):
            for pattern in patterns.values():
                text = pattern.sub(" , ", text)
    return found
