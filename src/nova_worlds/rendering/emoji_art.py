"""The world of real art: Fluent emoji in 3D (npm @lobehub/fluent-emoji-3d, MIT), named by emojibase-data (MIT).

`make data` fetches both by package name; neither is part of this repository.
"""

import json
import os
from pathlib import Path
from typing import Literal

from PIL import Image

from nova_video.common.errors import InputError
from nova_worlds.rendering.prepare import SCORE_CLIPS, WorldPicture, write_world
from nova_worlds.rendering.world import EmojiWorld

# emojibase's group numbers and keys, by the set they belong to.
CORE_GROUPS = {3: "animals-nature", 4: "food-drink"}
ALL_GROUPS = {**CORE_GROUPS, 0: "smileys-emotion", 5: "travel-places", 6: "activities", 7: "objects"}
ART_TYPES = (".webp", ".png")


def prepare_emoji(
    art: Path,
    names: Path,
    output: Path,
    set: Literal["core", "all"] = "core",
    score_clips: int = SCORE_CLIPS,
) -> EmojiWorld:
    """Prepare `output` from the art's folder (the unpacked package, or its assets) and emojibase's en/data.json.

    A file's name is its code points, as in `1f433.webp`. Those of the set's groups that emojibase names are taken,
    without skin tones, in the order of their code points.
    """
    groups = CORE_GROUPS if set == "core" else ALL_GROUPS
    entries = _read_names(names)
    files = _art_files(art)
    pictures = []
    for code_point, file in sorted(files.items()):
        label, group = entries.get(code_point, ("", -1))
        if group not in groups:
            continue
        try:
            with Image.open(file) as image:
                picture = image.convert("RGBA")
        except OSError as error:
            raise InputError(f"{file} is not a picture that can be read: {error}") from error
        pictures.append(WorldPicture(label, groups[group], code_point, picture))
    if not pictures:
        raise InputError(f"{names} names none of the {len(files)} pictures in {art}: expected files like 1f433.webp")
    return write_world(pictures, output, set, _art_notice(art), score_clips)


def _read_names(path: Path) -> dict[str, tuple[str, int]]:
    """Code points (lower case, without -fe0f) -> label in lower case and group."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            _plain(entry["hexcode"]): (str(entry["label"]).lower(), int(entry["group"]))
            for entry in entries
            if "group" in entry
        }
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected emojibase-data's en/data.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not emojibase-data's en/data.json: {error}") from error


def _art_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: expected the unpacked fluent-emoji-3d package or its assets")
    assets = folder / "assets" if (folder / "assets").is_dir() else folder
    files = {_plain(file.stem): file for file in sorted(assets.iterdir()) if file.suffix.lower() in ART_TYPES}
    if not files:
        raise InputError(f"{assets} has no pictures: expected files like 1f433.webp")
    return files


def _plain(code_point: str) -> str:
    return code_point.lower().replace("-fe0f", "")


def _art_notice(folder: Path) -> str:
    """Package, version and licence of the art, from its package.json if that is there."""
    for place in (folder, folder.parent):
        try:
            package = json.loads((place / "package.json").read_text(encoding="utf-8"))
            return f"{package['name']} {package['version']}, {package['license']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return f"pictures of {os.path.basename(folder.resolve())}"
