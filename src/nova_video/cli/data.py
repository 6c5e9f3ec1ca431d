"""The commands that make and look at datasets: what was typed to settings, and progress on stderr."""

import logging
import re
import time
from typing import TYPE_CHECKING

from nova_video.cli.arguments import DataInspect, Encode
from nova_video.cli.console import checkpoint_defaults, progress_bar, size_of
from nova_video.common.errors import InputError

if TYPE_CHECKING:
    from nova_video.data.encode import EncodeProgress
    from nova_video.data.encode_settings import EncodeSettings

TOLD_EVERY = 30.0  # seconds between lines about progress where stderr is no terminal

log = logging.getLogger(__name__)


def run_encode(args: Encode) -> None:
    """A source to a dataset."""
    import transformers

    from nova_video.data.encode import encode_dataset

    transformers.utils.logging.disable_progress_bar()  # the bars of loading; encoding has ours
    settings = _settings(args)
    told = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("encoding", total=None)

        def tell(done: "EncodeProgress") -> None:
            nonlocal told
            said = f"{_count(done.clips, 'clip')}" + (f", {done.rejected} rejected" if done.rejected else "")
            bar.update(task, completed=done.items, total=done.total, description=said)
            if bar.disable and time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                log.info("%d%s sources: %s", done.items, "" if done.total is None else f" of {done.total}", said)

        summary = encode_dataset(settings, tell)
    clips = sum(rows for bucket, rows in summary.clips.items() if bucket.frames > 1)
    pictures = sum(summary.clips.values()) - clips
    rejected = f", {summary.rejected} rejected (rejected.jsonl)" if summary.rejected else ""
    counts = [_count(count, what) for count, what in ((clips, "clip"), (pictures, "picture")) if count]
    counted = summary.counts
    was_there = counted.changed or counted.renamed or counted.removed or counted.unchanged
    if not was_there:
        since = ""
    elif counted.unchanged == summary.items:
        since = "; all was there, nothing was encoded"
    else:
        since = f"; since the last time {counted.described}"
    print(f"{args.output}: {' and '.join(counts)} from {_count(summary.items, 'source')}{rejected}{since}")


def run_data_inspect(args: DataInspect) -> None:
    """Problems first, a line each; then the picture, of the shards that have none."""
    from nova_video.common.checks import check_local, check_number
    from nova_video.common.devices import choose_device
    from nova_video.data.inspect import check_dataset, compare_samples, comparison_sheet
    from nova_video.io.files import atomic_path, check_writable

    choose_device(args.device)
    check_number("clips", args.clips, 0, integer=True)
    check_number("pictures", args.pictures, 0, integer=True)
    check_local("output", args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(args.output.parent)
    with progress_bar() as bar:
        task = bar.add_task("checking", total=None)
        checked = check_dataset(args.dataset, lambda done, total: bar.update(task, completed=done, total=total))
    for place, problems in checked.problems.items():
        for problem in problems:
            print(f"{place}: {problem}")
    shards = sum(map(len, checked.shards.values()))
    print(f"{args.dataset}: {checked.rows} samples in {shards} shards without problems")
    if shards and (args.clips or args.pictures):
        compared = compare_samples(
            args.dataset,
            checked.shards,
            clips=args.clips,
            pictures=args.pictures,
            sources=args.sources,
            model=args.model,
            seed=args.seed,
            device=args.device,
        )
        with atomic_path(args.output) as path:
            comparison_sheet(args.dataset, compared).save(path, format="png")
        ratios = [one.psnr for one in compared if one.psnr is not None]
        if ratios:
            print(f"decoded against source: {sum(ratios) / len(ratios):.1f} dB in the mean, at least {min(ratios):.1f}")
        else:
            print("the sources are not there: name their place with --sources")
        print(args.output)
    if checked.problems:
        count = sum(map(len, checked.problems.values()))
        raise InputError(f"{args.dataset}: {count} problem{'s' if count > 1 else ''} (see above)")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _settings(args: Encode) -> "EncodeSettings":
    """The checkpoint's own settings where nothing was typed."""
    from nova_video.common.checks import max_pixels
    from nova_video.common.devices import choose_device
    from nova_video.data.encode import makes_video, model_size, model_text
    from nova_video.data.encode_settings import EncodeSettings
    from nova_video.data.encoders import find_size_multiple
    from nova_video.data.sources import SourceSettings
    from nova_video.data.stages import DecodeSettings

    choose_device(args.device)
    if args.no_ray and args.ray is not None:
        raise InputError(f"got --no-ray and --ray {args.ray}: expected one of them")
    defaults = checkpoint_defaults(args.model)
    side = args.size
    if side is not None and re.fullmatch(r"\d+", side):
        side = f"{side}x{side}"
    height, width = size_of(side)
    if height is not None and width is not None:
        size, alone = (height, width), False
    elif (own := model_size(args.model)) is not None:
        size, alone = own
    else:
        raise InputError(f"{args.model} has no transformer/ that tells its size: expected --size, such as 768x480")
    if not args.frames and defaults.num_frames == 1 and makes_video(args.model):
        log.warning("%s says no length of its clips: sources give pictures, and clips with --frames 33", args.model)
    text, autoencoder = args.text_encoder, args.autoencoder or args.model
    return EncodeSettings(
        source=SourceSettings(args.source, args.caption_column, args.media_column, args.split, args.group, args.config),
        decode=DecodeSettings(
            frames=args.frames or (defaults.num_frames,),
            fps=defaults.fps if args.fps is None else args.fps,
            size=size,
            one_size=args.one_size or alone,
            cuts=args.cuts,
            threshold=args.cut_threshold,
            max_pixels=max_pixels() if args.max_pixels is None else args.max_pixels,
            multiple=find_size_multiple(autoencoder),
        ),
        output=args.output,
        model=autoencoder,
        text=model_text(args.model) if text is None else None if text == "none" else text,
        batch=args.batch,
        device=args.device,
        ray=None if args.no_ray else args.ray or "local",
    )
