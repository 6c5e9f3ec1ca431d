"""The settings of one run of `nova encode`."""

from dataclasses import dataclass
from pathlib import Path

from nova_video.common.checks import check_local, check_number
from nova_video.data.sources import SourceSettings
from nova_video.data.stages import DecodeSettings


@dataclass(frozen=True)
class EncodeSettings:
    """One run of `nova encode`."""

    source: SourceSettings
    decode: DecodeSettings
    output: Path
    """Local folder to write, or to go on with."""
    model: str = "emoji"
    """Name of the autoencoder: a checkpoint that has one, its own folder, or a user's own as `module:Class`."""
    text: str | None = "emoji"
    """Text encoder, or a checkpoint that names one; None: no text features."""
    batch: int | None = None
    """Most clips that go through the autoencoder together; None: by their size."""
    device: str = "auto"
    ray: str | None = None
    """None: in this process; `local`: on a Ray of this machine; else the address of a cluster."""

    def __post_init__(self) -> None:
        check_local("output", self.output, " (the source alone may be a URL)")
        if self.batch is not None:
            check_number("batch", self.batch, 1, integer=True)
