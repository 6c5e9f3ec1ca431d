"""`nova words`: the words that a model of a small world knows."""

import json
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path

from nova_video.cli.arguments import Words
from nova_video.common.errors import InputError
from nova_video.io.text import printable
from nova_video.text.vocabulary import Vocabulary

MODELS = Path(__file__).parents[1] / "models"
INDENT = "  "


def run_words(args: Words) -> None:
    """The words, grouped, and sentences that they form; or those that contain a text."""
    vocabulary = Vocabulary.load(_folder(args.model))
    if vocabulary is None:
        raise InputError(
            f"{args.model} has no list of words: expected a model of a small world, such as emoji; a released "
            "checkpoint reads any text"
        )
    lists = vocabulary.search(args.search)
    if not lists:
        raise InputError(f"no word of {args.model} has {args.search!r} in it: expected a part of one, see nova words")
    if args.json:
        sentences = {"clips": vocabulary.clips, "pictures": vocabulary.pictures}
        print(json.dumps({"model": args.model, "words": [asdict(each) for each in lists], **sentences}))
        return
    width = min(shutil.get_terminal_size().columns, 120)
    for each in lists:
        print(f"{printable(each.title)} ({len(each.phrases)})")
        text = printable(", ".join(sorted(each.phrases)))
        print(textwrap.fill(text, width, initial_indent=INDENT, subsequent_indent=INDENT))
    if args.search:
        return
    for title, templates in (("sentences", vocabulary.clips), ("sentences for pictures", vocabulary.pictures)):
        if templates:
            print(f"{title}; what is in brackets may be absent")
            print("".join(f"{INDENT}{printable(template)}\n" for template in templates), end="")


def _folder(model: str) -> Path:
    """The model's folder, found without the libraries that open it, unless it is on the hub."""
    for folder in (MODELS / model, Path(model).expanduser()):
        if model and folder.is_dir():
            return folder
    from nova_video.io.checkpoints import resolve_checkpoint

    return resolve_checkpoint(model)
