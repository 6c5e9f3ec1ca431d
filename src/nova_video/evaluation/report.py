"""What an evaluation of the emoji world found: as a table, as JSON, and as a sheet of clips to look at."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from nova_video.errors import InputError
from nova_video.evaluation.emoji import GENERATED, EmojiReport, Sample
from nova_video.media import atomic_path, check_writable

SHEET_FRAMES = 6  # of each clip, evenly spread
SHEET_SIDE = 88  # pixels of a frame
SHEET_COLUMNS = 2
SHEET_GAP = 10
LINE = 16  # pixels of a line of text
GOOD, BAD, INK, PAPER = (20, 120, 50), (190, 40, 30), (20, 20, 20), (255, 255, 255)


def check_report_folder(folder: Path) -> None:
    """Make the folder, or raise if it could not be written to later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; expected a folder") from error
    check_writable(folder)


def write_report(report: EmojiReport, folder: Path) -> None:
    """`scores.json` and, where clips were generated, `sheet.png`."""
    check_report_folder(folder)
    with atomic_path(folder / "scores.json") as path:
        path.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    if report.samples:
        with atomic_path(folder / "sheet.png") as path:
            contact_sheet(report.samples).save(path, format="png")


def print_report(report: EmojiReport, console: Console) -> None:
    """Two tables: every score of every source, and the generated clips by the motion asked for."""
    title = f"{report.model} on {report.world}, {report.settings.split} combinations, % with 95% interval"
    scores = Table(title=title, title_justify="left")
    scores.add_column("score")
    for source in report.sources:
        scores.add_column(source, justify="right")
        scores.add_column("clips", justify="right")
    for name in report.sources[GENERATED].rates:
        rates = [scores_of.rates[name] for scores_of in report.sources.values()]
        scores.add_row(name, *(cell for rate in rates for cell in (str(rate), str(rate.total))))
    console.print(scores)
    by_motion = report.sources[GENERATED].by_motion
    if by_motion:
        motions = Table(title="generated, by the motion asked for", title_justify="left")
        for column in ("motion", "clips", "motion right", "object right"):
            motions.add_column(column, justify="left" if column == "motion" else "right")
        for name, by_score in by_motion.items():
            motions.add_row(name, str(by_score["motion"].total), str(by_score["motion"]), str(by_score["object"]))
        console.print(motions)
    console.print(f"{report.settings.num_clips} clips, made in {report.seconds:.0f} s on {report.device}")


def contact_sheet(samples: list[Sample]) -> Image.Image:
    """Clips as rows of frames, under what was asked and what was seen (green if that is the same)."""
    rows = -(-len(samples) // SHEET_COLUMNS)
    shown = min(SHEET_FRAMES, max(len(sample.frames) for sample in samples))
    width, height = max(shown, SHEET_FRAMES) * SHEET_SIDE + SHEET_GAP, 2 * LINE + SHEET_SIDE + SHEET_GAP
    sheet = Image.new("RGB", (SHEET_COLUMNS * width + SHEET_GAP, rows * height + SHEET_GAP), PAPER)
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, sample in enumerate(samples):
        left, top = SHEET_GAP + number // rows * width, SHEET_GAP + number % rows * height
        brush.text((left, top), sample.caption, fill=INK, font=font)
        brush.text((left, top + LINE), f"seen: {sample.seen}", fill=GOOD if sample.right else BAD, font=font)
        for column, index in enumerate(np.linspace(0, len(sample.frames) - 1, min(shown, len(sample.frames)))):
            frame = Image.fromarray(sample.frames[round(index)]).resize((SHEET_SIDE - 2, SHEET_SIDE - 2))
            sheet.paste(frame, (left + column * SHEET_SIDE, top + 2 * LINE))
    return sheet
