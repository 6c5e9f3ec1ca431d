"""The words of the captioned world: backgrounds, motions, speeds, relations.

Everything else in `data` numbers these by their place in the tuples below, so the order is part of the prepared format.
"""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "red": (220, 40, 40),
    "orange": (255, 150, 30),
    "yellow": (250, 220, 50),
    "green": (50, 170, 80),
    "blue": (50, 100, 230),
    "purple": (135, 60, 200),
    "pink": (255, 150, 190),
    "brown": (130, 80, 40),
    "cyan": (60, 210, 220),
}
COLORS: tuple[str, ...] = tuple(BACKGROUNDS)

MOTIONS: tuple[str, ...] = (
    "staying still",
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "spinning clockwise",
    "spinning counterclockwise",
    "bouncing",
)
STILL = MOTIONS.index("staying still")

# The plain speed has no word. Still clips and images are always of plain speed.
SPEEDS: tuple[str, ...] = ("slowly", "", "quickly")
PLAIN = SPEEDS.index("")

# Of two objects the first is `relation` the second; "to the right of" and "below" are the same pictures told from the
# other object, so they are wordings, not relations of their own.
RELATIONS: tuple[str, ...] = ("to the left of", "above")
MIRRORED_RELATIONS: tuple[str, ...] = ("to the right of", "below")
