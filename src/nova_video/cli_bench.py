"""The command `nova bench ...`: lines for each configuration on stdout, its row in a JSON file."""

import shlex
from dataclasses import fields
from typing import Any

from nova_video.arguments import BenchSample
from nova_video.cli_generate import _size as size_of
from nova_video.errors import InputError


def run_bench_sample(args: BenchSample) -> None:
    """Each configuration in turn; one that fails has its error in its row, and the others go on."""
    from nova_video.benchmarks.rows import as_lines, read_rows, record_row
    from nova_video.benchmarks.sample import Asked, check_configs, measure
    from nova_video.devices import choose_device
    from nova_video.evaluation.report import check_report_folder

    if args.profile is not None:
        if len(args.config) > 1:
            raise InputError(f"got --profile with {len(args.config)} configurations: expected one")
        check_report_folder(args.profile.parent)
    height, width = size_of(args.size)
    asked = Asked(
        preset=args.preset,
        batch=args.batch,
        compile=not args.no_compile,
        frames=args.frames,
        size=None if height is None or width is None else (height, width),
        sets=args.sets,
        diffusion_steps=args.diffusion_steps,
        device=args.device,
        dtype=args.dtype,
        repeats=args.repeats,
    )
    choose_device(args.device)
    check_configs(args.config)
    check_report_folder(args.output.parent)
    read_rows(args.output)  # a file that cannot be added to is found before the work
    failed = []
    for config in args.config:
        row = measure(config, asked, _command_line(args, config), args.profile)
        record_row(args.output, row)
        print("\n".join(as_lines(row)), flush=True)
        if row.error is not None:
            failed.append(config)
    print(args.output)
    if failed:
        raise InputError(f"{len(failed)} of {len(args.config)} failed: {', '.join(failed)} (see above)")


def _command_line(args: BenchSample, config: str) -> str:
    """The command that repeats one row."""
    words: list[Any] = ["nova", "bench", args.what, "--config", config]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in ("what", "config", "profile", "output") or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words += [flag] if value is True else [flag, value]
    return shlex.join(map(str, words))
