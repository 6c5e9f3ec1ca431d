"""Training on many GPUs by calculation, the tables of docs/scaling.md: `python benchmarks/scaling.py [--check]`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from nova_video.bench.scaling import tables
from nova_video.bench.tables import filled
from nova_video.bench.train_rows import read_train_rows, usual_rows
from nova_video.io.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scaling:
    """Print the tables, and write them into the page."""

    check: bool = False
    """Write nothing: fail if a table of the page is another."""
    rows: Path = ROOT / "benchmarks" / "results" / "train.json"
    """What `nova bench train` wrote."""
    page: Path = ROOT / "docs" / "scaling.md"


def main(args: Scaling) -> int:
    made = tables(usual_rows(read_train_rows(args.rows)))
    page = args.page.read_text(encoding="utf-8")
    whole = filled(page, made)
    if args.check:
        if whole != page:
            print(f"{args.page} is not what is calculated: run python benchmarks/scaling.py", file=sys.stderr)
        return int(whole != page)
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    with atomic_path(args.page) as temporary:
        temporary.write_text(whole, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Scaling, config=(tyro.conf.FlagCreatePairsOff,))))
