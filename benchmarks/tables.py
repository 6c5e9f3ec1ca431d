"""The tables and plots of this folder, made from the rows in results/: `python benchmarks/tables.py [--check]`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from nova_video.bench.plots import PLOTS, is_current, write_plots
from nova_video.bench.rows import read_rows
from nova_video.bench.tables import filled, tables
from nova_video.bench.targets import sampling_targets, training_targets
from nova_video.bench.train_rows import read_train_rows, train_commands, train_table
from nova_video.io.files import atomic_path
from nova_worlds.presets.preset_rows import presets_table, read_preset_rows

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Tables:
    """Write the tables into README.md, and the plots."""

    check: bool = False
    """Write nothing: fail if a table or a plot is not that of the rows."""
    rows: Path = FOLDER / "results" / "sample.json"
    """What `nova bench sample` wrote."""
    presets: Path = FOLDER / "results" / "presets.json"
    """What `nova bench presets` wrote."""
    training: Path = FOLDER / "results" / "train.json"
    """What `nova bench train` wrote."""
    decodes: Path = FOLDER / "measured" / "vae.json"
    """What `python benchmarks/vae.py` wrote."""
    page: Path = FOLDER / "README.md"
    plots: Path = FOLDER / "plots"


def main(args: Tables) -> int:
    rows = read_rows(args.rows)
    page = args.page.read_text(encoding="utf-8")
    trained = read_train_rows(args.training)
    own = {
        "presets": presets_table(read_preset_rows(args.presets)),
        "targets": sampling_targets(rows, json.loads(args.decodes.read_text(encoding="utf-8"))),
        "training-targets": training_targets(trained),
        "training": train_table(trained),
        "training-commands": train_commands(trained),
    }
    made = filled(page, tables(rows) | own)
    if args.check:
        plots = [args.plots / f"{name}.png" for name in PLOTS]
        stale = [path for path in plots if not is_current(path, rows)] + ([args.page] if made != page else [])
        for path in stale:
            print(f"{path} is not that of the rows: run python benchmarks/tables.py", file=sys.stderr)
        return 1 if stale else 0
    with atomic_path(args.page) as temporary:
        temporary.write_text(made, encoding="utf-8")
    for path in [args.page, *write_plots(rows, args.plots)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Tables, config=(tyro.conf.FlagCreatePairsOff,))))
