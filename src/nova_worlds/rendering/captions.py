"""Captions of the world: what a clip shows -> a sentence (in several wordings), and back.

The first wording of each kind is the main form, which evaluation uses:
"a whale moving left on a blue background", "a whale on a blue background" for an image, and
"a whale to the left of a red apple on a white background" for an image of two objects.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nova_video.text.vocabulary import Vocabulary, WordList
from nova_worlds.rendering.lexicon import COLORS, MIRRORED_RELATIONS, MOTIONS, PLAIN, RELATIONS, SPEEDS

# {thing}: an object with its article; {action}: "moving left slowly"; {manner}: "slowly moving left"; {color}: "blue";
# {backdrop}: "a blue background".
CLIP_WORDINGS: tuple[str, ...] = (
    "{thing} {action} on {backdrop}",
    "{thing} is {action} on {backdrop}",
    "{thing} {manner} in front of {backdrop}",
    "on {backdrop}, {thing} is {manner}",
    "{backdrop} with {thing} {action}",
    "a video of {thing} {manner} on {backdrop}",
    "{thing}, {action}, {color} background",
    "{color} background, {thing} {manner}",
)
# No wordings of training, but drawn as well: the judge found all of 16 backgrounds and motions, and 15 objects.
OTHER_CLIP_WORDINGS: tuple[str, ...] = ("{thing} on {backdrop} {action}", "{thing} on {backdrop} {manner}")
IMAGE_WORDINGS: tuple[str, ...] = (
    "{thing} on {backdrop}",
    "{thing} is on {backdrop}",
    "{thing} in front of {backdrop}",
    "on {backdrop}, {thing}",
    "{backdrop} with {thing}",
    "a picture of {thing} on {backdrop}",
    "{thing}, {color} background",
    "{color} background, {thing}",
)
# {first} {relation} {second}: also told from the second object, with the mirrored relation.
PAIR_WORDINGS: tuple[str, ...] = (
    "{first} {relation} {second} on {backdrop}",
    "{first} is {relation} {second} on {backdrop}",
    "{first} {relation} {second} in front of {backdrop}",
    "on {backdrop}, {first} {relation} {second}",
    "{backdrop} with {first} {relation} {second}",
    "a picture of {first} {relation} {second} on {backdrop}",
    "{first} {relation} {second}, {color} background",
    "{color} background, {first} {relation} {second}",
)


FILLER_WORDS = ("a", "an", "the", "is", "are")  # words that change nothing about a caption
_PLACES = {  # a wording's field -> what stands there, in the terms of a vocabulary
    "thing": "{object}",
    "first": "{object}",
    "second": "{object}",
    "relation": "{relation}",
    "action": "{motion} [{speed}]",
    "manner": "[{speed}] {motion}",
    "color": "{background}",
    "backdrop": "{background}",
}


@dataclass(frozen=True)
class Scene:
    """The contents of a caption."""

    object: str
    background: str
    motion: str | None = None
    """None for an image, which counts as "staying still"."""
    speed: str = SPEEDS[PLAIN]
    relation: str | None = None
    second: str | None = None


def clip_caption(name: str, motion: str, speed: str, color: str, wording: int = 0) -> str:
    return CLIP_WORDINGS[wording].format(
        thing=with_article(name),
        action=f"{motion} {speed}".strip(),
        manner=f"{speed} {motion}".strip(),
        color=color,
        backdrop=with_article(f"{color} background"),
    )


def image_caption(name: str, color: str, wording: int = 0) -> str:
    return IMAGE_WORDINGS[wording].format(
        thing=with_article(name), color=color, backdrop=with_article(f"{color} background")
    )


def pair_caption(first: str, relation: str, second: str, color: str, wording: int = 0, mirrored: bool = False) -> str:
    """The caption of two objects. `mirrored` tells it from the second one: "b to the right of a"."""
    if mirrored:
        first, relation, second = second, MIRRORED_RELATIONS[RELATIONS.index(relation)], first
    return PAIR_WORDINGS[wording].format(
        first=with_article(first),
        relation=relation,
        second=with_article(second),
        color=color,
        backdrop=with_article(f"{color} background"),
    )


# A vowel letter without a vowel sound, and the other way round.
_SOUNDS_LIKE_CONSONANT = re.compile(r"uni(corn|form|t|v|q|cycle)|use|ute|uti|eu|ewe|one\b")
_SOUNDS_LIKE_VOWEL = re.compile(r"hour|heir|honest|8|11\b|18|x-")
# The thing itself is named before these words: "nest" in "nest with eggs".
_AFTERTHOUGHT = re.compile(r" (of|with|without|in|on|behind|and|from) ")
_SINGULAR_IN_S = re.compile(r".*(ss|us|is|as|ros)$")
_MASS_NOUN = re.compile(
    r"bacon|badminton|bowling|bread|broccoli|butter|camping|cooking|dna|fire|fog|food|garlic|ice|lacrosse|lightning"
    r"|liquid|meat|oden|popcorn|rice|sake|salt|soap|spaghetti|sushi|tennis|thread|wood|yarn"
)


def with_article(name: str) -> str:
    """ "a whale", "an ox", "a unicorn"; plurals and what is not counted go bare: "cherries", "popcorn"."""
    noun = _AFTERTHOUGHT.split(name)[0].split()[-1]
    plural = noun.endswith("s") and not _SINGULAR_IN_S.match(noun)
    if plural or _MASS_NOUN.fullmatch(noun):
        return name
    vowel = name[0] in "aeiou" and not _SOUNDS_LIKE_CONSONANT.match(name)
    return f"an {name}" if vowel or _SOUNDS_LIKE_VOWEL.match(name) else f"a {name}"


def parse_caption(caption: str, names: Sequence[str]) -> Scene | None:
    """The scene of a caption in any wording above; None if it has none of them about `names`."""
    known = {with_article(name): name for name in names}
    for kind, patterns in _PATTERNS.items():
        for pattern in patterns:
            match = pattern.fullmatch(caption)
            if match is None:
                continue
            said = match.groupdict()
            color = said["color"]
            if kind == "pair":
                first, second = known.get(said["first"]), known.get(said["second"])
                relation = said["relation"]
                if relation in MIRRORED_RELATIONS:
                    first, relation, second = second, RELATIONS[MIRRORED_RELATIONS.index(relation)], first
                if first is not None and second is not None:
                    return Scene(first, color, relation=relation, second=second)
            elif (thing := known.get(said["thing"])) is not None:
                if kind == "image":
                    return Scene(thing, color)
                return Scene(thing, color, said["motion"], said["before"] or said["after"] or SPEEDS[PLAIN])
    return None


def caption_vocabulary(names: Mapping[str, Sequence[str]], clips: bool, pictures: bool, pairs: bool) -> Vocabulary:
    """The words of the captions above, about objects of these names by group, and the kinds of captions trained on."""
    words = [WordList("object", group.replace("-", " and "), tuple(named)) for group, named in names.items()]
    words.append(WordList("background", "backgrounds", tuple(f"{color} background" for color in COLORS)))
    if clips:
        words.append(WordList("motion", "motions", MOTIONS))
        words.append(WordList("speed", "speeds", tuple(filter(None, SPEEDS))))
    if pairs:
        words.append(WordList("relation", "relations of two objects, in pictures", RELATIONS + MIRRORED_RELATIONS))
    return Vocabulary(
        tuple(words),
        tuple(dict.fromkeys(map(_template, CLIP_WORDINGS + OTHER_CLIP_WORDINGS))) if clips else (),
        tuple(dict.fromkeys(map(_template, IMAGE_WORDINGS * pictures + PAIR_WORDINGS * pairs))),
        FILLER_WORDS,
    )


def _template(wording: str) -> str:
    """A wording as a template of a vocabulary. All parts but the objects and their relation may be absent."""
    parts = []
    for before, field in re.findall(r"((?:\w+ )*)\{(\w+)\}", wording.replace(",", "")):
        words = " ".join(word for word in before.split() if word not in (*FILLER_WORDS, "background"))
        part = f"{words} {_PLACES[field]}".strip()
        parts.append(part if field in ("thing", "first", "second", "relation") else f"[{part}]")
    return " ".join(parts)


def _pattern(wording: str) -> re.Pattern[str]:
    colors, speeds = "|".join(COLORS), "|".join(filter(None, SPEEDS))
    motion = f"(?P<motion>{'|'.join(MOTIONS)})"
    fields = {
        "thing": "(?P<thing>.+?)",
        "first": "(?P<first>.+?)",
        "second": "(?P<second>.+?)",
        "relation": f"(?P<relation>{'|'.join(RELATIONS + MIRRORED_RELATIONS)})",
        "action": f"(?P<before>){motion}(?: (?P<after>{speeds}))?",
        "manner": f"(?:(?P<before>{speeds}) )?{motion}(?P<after>)",
        "color": f"(?P<color>{colors})",
        "backdrop": f"an? (?P<color>{colors}) background",
    }
    return re.compile(wording.format(**fields))


_PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {
    "pair": tuple(map(_pattern, PAIR_WORDINGS)),
    "clip": tuple(map(_pattern, CLIP_WORDINGS)),
    "image": tuple(map(_pattern, IMAGE_WORDINGS)),
}
