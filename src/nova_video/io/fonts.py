"""Letters on sheets: Pillow's own font, or one of the system's where a text has letters that it lacks.

Used by `data/sheets.py` and `evaluation/report.py`.
"""

import unicodedata
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
SYSTEM = (  # as Pillow finds them by name: the widest first, of Linux, macOS and Windows
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "DejaVuSans.ttf",
    "arial.ttf",
)
UNDRAWABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, lone surrogates, ends of lines
NO_LETTER = "\uffff"  # every font draws it as a letter that it lacks


def drawable(text: str) -> str:
    """The text with a space for everything that has no shape, which the layout of letters refuses."""
    return "".join(" " if unicodedata.category(letter) in UNDRAWABLE else letter for letter in text)


def font_for(text: str, size: int) -> Font:
    """The first font that has all letters of the text; where none has, the one that has most."""
    letters = frozenset(drawable(text)) - {" "}
    return max(_fonts(size), key=lambda font: sum(_has(font, letter) for letter in letters))


@cache
def _fonts(size: int) -> list[Font]:
    found: list[Font] = [ImageFont.load_default(size=size)]
    for name in SYSTEM:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return found


@cache
def _has(font: Font, letter: str) -> bool:
    drawn, lacking = font.getmask(letter), font.getmask(NO_LETTER)
    return drawn.size != lacking.size or bytes(drawn) != bytes(lacking)
