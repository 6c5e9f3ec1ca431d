"""Does it pay to encode only some tokens for a set, and to reuse the others? `python benchmarks/reuse.py --help`.

The token cache of LazyMAR (arXiv 2503.12450) for NOVA's spatial encoder. Every so many sets all tokens are encoded, and
keys and values of all blocks are kept. For the sets between, the blocks compute the newly revealed tokens and those of
the set alone, and read keys and values of the others as they were. The same held-out sentences of the emoji world are
made exactly, so, and with fewer sets, with the same random numbers, and judged as `nova bench presets` does.

*Rows* are those that go through the spatial encoder's blocks, as a share of the exact way's. The engine here is one for
measuring what reuse costs in scores, not for speed. Results are written as JSON, with device, versions and command.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from result_file import result_of, write_result
from torch import Tensor

from nova_video.common.devices import choose_device
from nova_video.fast.fast_engine import DirectRunner, FastEngine, in_passes
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.model import Positions
from nova_video.model.patches import gather_tokens
from nova_video.sampling.presets import EXACT, Preset
from nova_worlds.evaluation.emoji import EmojiSettings
from nova_worlds.judging.rates import PairedRates
from nova_worlds.presets import preset_study as presets
from nova_worlds.presets.preset_outcome import Outcome
from nova_worlds.rendering.world import EmojiWorld


@dataclass(frozen=True)
class Reuse:
    """Measure what reusing token features costs."""

    output: Path
    """JSON file to write."""
    every: tuple[int, ...] = (2, 4)
    """Sets from one in which all tokens are encoded to the next."""
    sets: tuple[float, ...] = (0.5,)
    """Shares of the sets, for comparison."""
    model: str = "emoji"
    data: Path = Path("data/emoji")
    """A prepared world."""
    num_clips: int = 4000
    num_pictures: int = 2000
    num_frames: int = 17
    batch_size: int = 250
    diffusion_steps: int | None = None
    device: str = "auto"


def main(args: Reuse) -> None:
    settings = EmojiSettings(
        num_clips=args.num_clips,
        num_pairs=args.num_pictures,
        num_frames=args.num_frames,
        batch_size=args.batch_size,
        diffusion_steps=args.diffusion_steps,
    )
    device = choose_device(args.device)
    rows: list[dict[str, Any]] = []
    result = result_of("reuse", device, model=args.model, rows=rows)
    with tempfile.TemporaryDirectory() as kept:
        asked = presets.VariantSettings(args.model, args.data, Path(kept), settings, device=args.device)
        maker = presets.Maker(asked, resolve_checkpoint(args.model), EmojiWorld.load(args.data, device))
        exact, all_rows = None, 1
        for name, every, shortcuts in ways(args):
            presets.VARIANTS[name] = shortcuts
            engine = ReusingEngine(maker.pipe.transformer, DirectRunner(), every=every)
            maker.pipe.engines.engine = partial(always, engine)  # type: ignore[method-assign]
            outcome = maker.make(name, name)
            if exact is None:
                exact, all_rows = outcome, engine.rows
            rows.append(row_of(name, outcome, exact, engine.rows / all_rows))
            print(json.dumps(rows[-1]), flush=True)
            write_result(args.output, result)


def ways(args: Reuse) -> Iterator[tuple[str, int, Preset]]:
    """Name, sets between two encodings of all tokens, and shortcuts; the exact way first."""
    yield "exact", 1, EXACT
    for share in args.sets:
        yield f"sets-{share}", 1, replace(EXACT, sets=share)
    for every in args.every:
        yield f"features-every-{every}", every, EXACT


def row_of(name: str, outcome: Outcome, exact: Outcome, rows: float) -> dict[str, Any]:
    """Scores in percent, and their difference from the exact way in points, with its 95% interval."""
    scores = {}
    for score, right in outcome.flags.items():
        change = PairedRates.of(right, exact.flags[score])
        low, high = change.interval()
        scores[score] = {
            "percent": round(100 * float(right.float().mean()), 2),
            "points": round(100 * change.value, 2),
            "points_95": [round(100 * low, 2), round(100 * high, 2)],
        }
    return {"way": name, "rows": round(rows, 3), "distance": round(outcome.distance, 3), "scores": scores}


def always(engine: FastEngine, compile: bool, fp8: bool = False) -> FastEngine:
    """In place of `NovaPipeline.engine`."""
    return engine


# The engine -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Kept:
    """Keys and values (B, heads, N, head_dim) of one block, from when all tokens were encoded."""

    keys: Tensor | None = None
    values: Tensor | None = None
    at: Tensor | None = None
    """Where rows that are computed anew belong, (B, R); None: behind all."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of all tokens: keep them. Of some: what is kept, with theirs in their places."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key, value
            return key, value
        if self.at is None:
            return torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        at = self.at[:, None, :, None].expand_as(key)
        return self.keys.scatter(2, at, key), self.values.scatter(2, at, value)


@dataclass(frozen=True, eq=False)
class ReusingEngine(FastEngine):
    """Encodes all tokens every so many sets of a frame."""

    every: int = 1
    blocks: list[Kept] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    """Revealed tokens at each set since all were encoded, of one frame."""
    counted: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """That went through blocks so far."""
        return sum(self.counted)

    def features(
        self, condition: Tensor, embedded: Tensor, visible: Tensor, ids: Tensor, positions: Positions
    ) -> Tensor:
        passes, count, known = len(condition) // len(embedded), condition.shape[1], visible.shape[1]
        embedded, visible, ids = (in_passes(x, passes) for x in (embedded, visible, ids))
        if not self.seen or known <= self.seen[-1] or len(self.seen) == self.every:  # a new frame, or enough of it
            self.seen.clear()
            self.blocks[:] = [Kept() for _ in self.model.image_encoder.blocks]
        self.seen.append(known)
        first, half = self.seen[0], len(self.blocks) // 2
        encoder, mask = self.model.image_encoder, self.model.mask_embed.mask_token.to(embedded.dtype)
        space, rotary = positions.image_space, positions.image_rotary
        revealed = gather_tokens(embedded, visible)
        others = mask.repeat(embedded.shape[1], 1)
        if space is not None:
            revealed, others = revealed + space[visible], others + space
        others = others.expand(len(ids), -1, -1)
        if len(self.seen) == 1:  # all tokens, behind the condition
            x = torch.cat([condition, revealed], dim=1)
            at = None if rotary is None else rotary.at(visible).after_condition(count)
            x = self._through(x, at, slice(half))
            every = others.scatter(1, visible.unsqueeze(-1).expand_as(revealed), x[:, count:])
            at = None if rotary is None else rotary.after_condition(count)
            x = self._through(torch.cat([x[:, :count], every], dim=1), at, slice(half, None))
            return gather_tokens(encoder.norm(x[:, count:]), ids)
        new = visible[:, first:]
        x = self._through(revealed[:, first:], None if rotary is None else rotary.at(new), slice(half))
        rows = torch.cat([new, ids], dim=1)
        for block in self.blocks[half:]:
            block.at = rows + count
        x = torch.cat([x, gather_tokens(others, ids)], dim=1)
        x = self._through(x, None if rotary is None else rotary.at(rows), slice(half, None))
        return encoder.norm(x[:, new.shape[1] :])

    def _through(self, x: Tensor, rotary: Any, which: slice) -> Tensor:
        encoder = self.model.image_encoder
        for block, kept in zip(encoder.blocks[which], self.blocks[which], strict=True):
            x = block(x, rotary, None, kept)
            self.counted.append(x.shape[0] * x.shape[1])
        return x


if __name__ == "__main__":
    main(tyro.cli(Reuse, description=__doc__))
