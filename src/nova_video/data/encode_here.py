"""The stages of `nova encode` in this process, without Ray."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from nova_video.data.dataset import EncodedSample
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.encoders import EncodeLatents, EncodeText
from nova_video.data.failures import OneByOne
from nova_video.data.stages import Decode, DecodedClip, Item, ItemResult, Motion, Rejected, decode_with_motion
from nova_video.io.prefetch import prefetch

TOGETHER = 16 << 20  # pixels that wait for the encoders here: several forward passes, so that few are part full
AHEAD = 8  # clips that are decoded ahead of the encoders here


@dataclass(frozen=True)
class Stages:
    """All stages of a run."""

    decode: Decode
    motion: Motion
    latents: EncodeLatents
    text: EncodeText | None
    sparing: OneByOne = field(default_factory=OneByOne)

    @classmethod
    def load(cls, settings: EncodeSettings) -> "Stages":
        """With the weights of those that have some."""
        latents = EncodeLatents(settings.model, settings.device, settings.batch)
        text = None if settings.text is None else EncodeText(settings.text, settings.device)
        latents.load()
        if text is not None:
            text.load()
        return cls(Decode(settings.decode), Motion(), latents, text)

    def encode(self, clips: list[DecodedClip]) -> list[EncodedSample | Exception]:
        """Clips of any sizes -> samples, in their order; an error in the place of a clip that fails."""
        return self.sparing(self._encode, clips)

    def _encode(self, clips: Sequence[DecodedClip]) -> list[EncodedSample]:
        texts = None if self.text is None else self.text([clip.caption for clip in clips])
        moments = self.latents(clips)
        if texts is None:
            return [clip.sample(values) for clip, values in zip(clips, moments, strict=True)]
        return [
            clip.sample(values, features.text, features.short)
            for clip, values, features in zip(clips, moments, texts, strict=True)
        ]


def encode_items_here(items: Iterable[Item], stages: Stages) -> Iterator[ItemResult]:
    """Items in their order, decoded ahead in a thread. Clips wait until several go through the encoders, over items but
    not over groups: what a clip is batched with is the same in every run."""
    waiting: list[DecodedClip] = []
    ended: list[Item] = []
    samples: defaultdict[int, list[EncodedSample]] = defaultdict(list)  # by their item's number, as the next
    rejected: defaultdict[int, list[Rejected]] = defaultdict(list)
    with prefetch(_decode_items(items, stages), AHEAD, nullcontext()) as stream:
        for item, found in stream:
            if isinstance(found, DecodedClip):
                waiting.append(found)
            elif isinstance(found, Rejected):
                rejected[item.index].append(found)
            else:
                ended.append(item)
            if sum(clip.frames[..., 0].size for clip in waiting) >= TOGETHER or (found is None and item.last):
                for clip, sample in zip(waiting, stages.encode(waiting), strict=True):
                    if isinstance(sample, Exception):
                        rejected[clip.index].append(clip.rejected(sample))
                    else:
                        samples[clip.index].append(sample)
                waiting = []
                for one in ended:
                    yield ItemResult(
                        group=one.group,
                        index=one.index,
                        last=one.last,
                        final=one.final,
                        samples=samples.pop(one.index, []),
                        rejected=rejected.pop(one.index, []),
                    )
                ended = []


def _decode_items(items: Iterable[Item], stages: Stages) -> Iterator[tuple[Item, DecodedClip | Rejected | None]]:
    """The clips and problems of each item, and None at its end."""
    for item in items:
        for found in decode_with_motion(stages.decode, stages.motion, item):
            yield item, found
        yield item, None
