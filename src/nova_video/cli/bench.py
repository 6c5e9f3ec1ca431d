"""The commands `nova bench ...`: what was measured on stdout, and its rows in a JSON file."""

import contextlib
import json
import os
import shlex
import sys
from dataclasses import asdict, fields
from typing import Any

from nova_video.cli.arguments import SAMPLING, BenchPresets, BenchSample, BenchServe, BenchTrain
from nova_video.cli.console import size_of
from nova_video.cli.flags import given_options, typed_words
from nova_video.common.errors import InputError
from nova_video.pipeline.options import Options


def run_bench_sample(args: BenchSample) -> None:
    """Each configuration in turn; one that fails has its error in its row, and the others go on."""
    from nova_video.bench.rows import as_lines, read_rows, record_row
    from nova_video.bench.sample import SampleSettings, check_work, measure
    from nova_video.common.devices import choose_device
    from nova_video.io.files import make_folder

    _check_profile(args)
    asked = SampleSettings(**_shared_values(args, SampleSettings))
    choose_device(args.device)
    check_work(args.config, asked)
    make_folder(args.output.parent)
    read_rows(args.output)  # a file that cannot be added to is found before the work
    failed = []
    for config in args.config:
        row = measure(
            config,
            asked,
            _command_line("sample", args, ("config", "profile", "output"), "--config", config),
            args.profile,
        )
        record_row(args.output, row)
        print("\n".join(as_lines(row)), flush=True)
        if row.error is not None:
            failed.append(config)
    print(args.output)
    if failed:
        raise InputError(f"{len(failed)} of {len(args.config)} failed: {', '.join(failed)} (see above)")


def run_bench_presets(args: BenchPresets) -> None:
    """Each variant in turn; one that fails has its error in its row, and the others go on."""
    from nova_video.common.devices import choose_device
    from nova_video.io.files import make_folder
    from nova_worlds.evaluation.emoji import EmojiSettings
    from nova_worlds.presets.preset_rows import (
        PresetRow,
        as_aligned,
        made_how,
        merge_rows,
        read_preset_rows,
        write_preset_rows,
    )
    from nova_worlds.presets.preset_study import CPU_BATCH, GPU_BATCH, VARIANTS, VariantSettings, measure_presets

    on_gpu = choose_device(args.device).type == "cuda"
    settings = EmojiSettings(
        num_clips=args.num_clips,
        num_pairs=args.num_pictures,
        num_frames=args.num_frames,
        seed=args.seed,
        batch_size=args.batch_size if args.batch_size is not None else GPU_BATCH if on_gpu else CPU_BATCH,
        **given_options(args, Options, ("sets", "diffusion_steps", "guidance_scale", "motion_flow")),
    )
    asked = VariantSettings(
        model=args.model,
        data=args.data,
        keep=args.keep,
        settings=settings,
        variants=args.variants or tuple(name for name, parts in VARIANTS.items() if on_gpu or not parts.fp8),
        compile=args.compile is not False,
        device=args.device,
        dtype=args.dtype,
    )
    make_folder(args.output.parent)
    command = _command_line("presets", args, ("keep", "output"))
    before = read_preset_rows(args.output)  # a file that cannot be added to is found before the work
    rows: list[PresetRow] = []
    for row, kept in measure_presets(asked, command):
        rows.append(row)
        write_preset_rows(args.output, merge_rows(before, rows))
        print(row.line() + (f" (kept in {args.keep})" if kept else ""), flush=True)
    print("\n".join(["", made_how(rows[0]), *as_aligned(rows)]))
    print(args.output)
    failed = [row.preset for row in rows if row.error is not None]
    if failed:
        raise InputError(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)} (see above)")


def run_bench_train(args: BenchTrain) -> None:
    """Each configuration in turn; one that fails has its error in its row, and the others go on.

    Of several processes all measure, and the first one prints and writes: JSON on stdout, words on stderr.
    """
    from nova_video.bench.rows import record_row
    from nova_video.bench.train import AskedTraining, check_training, measure_training
    from nova_video.bench.train_rows import read_train_rows, train_line
    from nova_video.common.devices import choose_device
    from nova_video.io.files import make_folder

    _check_profile(args)
    asked = AskedTraining(**_shared_values(args, AskedTraining))
    choose_device(args.device)
    check_training(args.config, asked)
    make_folder(args.output.parent)
    read_train_rows(args.output)  # a file that cannot be added to is found before the work
    processes, index = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    failed = []
    for config in args.config:
        command = _command_line("train", args, ("config", "profile", "output"), "--config", config)
        if processes > 1:
            command = f"torchrun --nproc-per-node {processes} -m nova_video {command.removeprefix('nova ')}"
        row = measure_training(config, asked, command, args.profile)
        if row.error is not None:
            failed.append(config)
        if index == 0:
            record_row(args.output, row)
            print(json.dumps(asdict(row)), flush=True)
            print(train_line(row), file=sys.stderr, flush=True)
    if failed:
        raise InputError(f"{len(failed)} of {len(args.config)} failed: {', '.join(failed)} (see above)")


def _shared_values(args: BenchSample | BenchTrain, record: type[Any]) -> dict[str, Any]:
    """The values of a command's flags that are fields of a record too; the size as (height, width)."""
    values = {each.name: getattr(args, each.name) for each in fields(record)}
    height, width = size_of(args.size)
    return values | {"size": None if height is None or width is None else (height, width)}


def run_bench_serve(args: BenchServe) -> None:
    """Each number of clients in turn, against the server that is named or one of its own."""
    from nova_video.bench.rows import record_row
    from nova_video.bench.sample import device_name, versions
    from nova_video.bench.serve import AskedLoad, ServeRow, measure_load, read_serve_rows, serve_lines
    from nova_video.bench.server_client import ServerClient, own_server
    from nova_video.common.devices import choose_device
    from nova_video.io.files import make_folder
    from nova_video.io.text import read_text

    changed = given_options(args, Options, SAMPLING) | ({} if args.frames is None else {"num_frames": args.frames})
    fields = {"prompt": args.prompt, **changed}
    loads = [AskedLoad(number, args.requests, args.cancels, fields) for number in args.clients]
    make_folder(args.output.parent)
    read_serve_rows(args.output)  # a file that cannot be added to is found before the work
    failed = []
    with contextlib.ExitStack() as stack:
        if args.url is None:
            place = device_name(choose_device(args.device))
            client = stack.enter_context(own_server(["--model", args.model, "--device", args.device])).client
        else:
            key = None if args.api_key is None else read_text(args.api_key).split("\n")[0].strip()
            place, client = f"that of {args.url}", ServerClient(args.url, key)
        for load in loads:
            typed = _command_line("serve", args, ("clients", "output"), "--clients", str(load.clients))
            base = ServeRow(args.model, load.clients, load.requests, place, versions(), typed, changed)
            row = measure_load(client, load, base)
            record_row(args.output, row)
            print("\n".join(serve_lines(row)), flush=True)
            if row.error is not None:
                failed.append(str(load.clients))
    print(args.output)
    if failed:
        raise InputError(f"{len(failed)} of {len(loads)} failed: {', '.join(failed)} clients (see above)")


def _check_profile(args: BenchSample | BenchTrain) -> None:
    from nova_video.io.files import make_folder

    if args.profile is not None:
        if len(args.config) > 1:
            raise InputError(f"got --profile with {len(args.config)} configurations: expected one")
        make_folder(args.profile.parent)


def _command_line(
    what: str, args: BenchSample | BenchPresets | BenchTrain | BenchServe, without: tuple[str, ...], *given: str
) -> str:
    """The command that repeats a row: `given`, and what is not as by default."""
    return shlex.join(["nova", "bench", what, *given, *typed_words(args, Options, without)])
