"""The README.md of a saved pipeline: what the Hugging Face Hub reads, and the line that opens the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

CARD = "README.md"


def pipeline_card(name: str, kind: str, base_model: str | None, known: Mapping[str, Any]) -> str:
    """`kind` is text-to-image or text-to-video; `known` are license, tags and datasets, where they are known."""
    tags = list(dict.fromkeys(["nova-video", "nova", kind, *(known.get("tags") or [])]))
    data = ModelCardData(
        library_name="nova-video",
        pipeline_tag=kind,
        base_model=base_model,
        license=known.get("license"),
        datasets=known.get("datasets"),
        tags=tags,
    )
    made = "pipe(...).save('clip.mp4')" if kind == "text-to-video" else "pipe(...).save('picture.png')"
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", ""]
    lines += [
        "Weights of NOVA, autoregressive video generation without vector quantisation, for the package nova-video."
        " There is no code in this folder:",
        "",
        "```python",
        "from nova_video import NovaPipeline",
        "",
        f"pipe = NovaPipeline.from_pretrained({name!r})  # or this folder's path",
        f"# {made}",
        "```",
    ]
    if base_model:
        lines += ["", f"Made from `{base_model}`."]
    return "\n".join(lines) + "\n"


def card_facts(folder: Path) -> dict[str, Any]:
    """License, tags and datasets that a checkpoint's own card names; none where there is no card to read."""
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, HFValidationError):
        return {}
    return {name: data[name] for name in ("license", "tags", "datasets") if data.get(name)}
