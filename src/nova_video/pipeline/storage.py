"""How a pipeline is opened from a checkpoint and saved to one: the methods that diffusers' users know."""

import inspect
import tempfile
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
from diffusers import DiffusionPipeline

from nova_video.common.devices import choose_device
from nova_video.common.errors import InputError
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.io.files import make_readable
from nova_video.io.weights import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, index_or_single
from nova_video.model.lora import adapter_names
from nova_video.pipeline.keywords import OPEN_HINTS, refuse_keywords
from nova_video.pipeline.loading import check_parts, load_parts, load_scheduler
from nova_video.pipeline.model_card import CARD, card_facts, pipeline_card
from nova_video.pipeline.offload import LowMemory, enable_low_memory
from nova_video.pipeline.plan import Capabilities
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.sampling.schedulers import TrainedNoise, check_scheduler

Dtypes = torch.dtype | dict[str, torch.dtype] | None
FROM_CHECKPOINT = object()
"""In `from_pretrained`: the part is the checkpoint's own."""


class StorageMixin(DiffusionPipeline):
    """The part of `NovaPipeline` that opens and saves checkpoints."""

    settings: CheckpointSettings

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    @abstractmethod
    def trained_noise(self) -> TrainedNoise: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: Dtypes = None,
        *,
        dtype: Dtypes = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | None = None,
        low_cpu_mem_usage: bool = True,
        low_memory: bool | torch.device | str | LowMemory = False,
        transformer: Any = FROM_CHECKPOINT,
        scheduler: Any = FROM_CHECKPOINT,
        vae: Any = FROM_CHECKPOINT,
        text_encoder: Any = FROM_CHECKPOINT,
        tokenizer: Any = FROM_CHECKPOINT,
        head: type[torch.nn.Module] | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> Self:
        """Open "emoji" (the bundled model), a local folder or a hub id; only its component folders count.

        As in diffusers, weights become float32 unless `torch_dtype` (or `dtype`) says otherwise, for all parts or by
        name ({"transformer": torch.bfloat16, "default": torch.float32}). `variant` is that of the files, such as fp16;
        without it the plain ones are taken, or else the fp16 or bf16 ones. `device_map` is a device for the whole.

        With `low_memory` (True: on "cuda", or a GPU's name) parts stay in the processor's memory and take turns on the
        GPU, the text encoder layer by layer (`offload.py`). Such a pipeline is not to be moved. A `LowMemory` says
        more: the text encoder in 8 bits, frames decoded in tiles.

        `transformer`, `scheduler`, `vae`, `text_encoder` and `tokenizer` replace the checkpoint's own parts: each is a
        part as it is, or the folder of one. None leaves an optional one out. No code of a checkpoint is ever run: of
        one that was made with a head of the user's own, `head` is the class.
        """
        named = [name for name, value in others.items() if value is not None]  # the Auto classes give some as None
        refuse_keywords("from_pretrained", named, OPEN_HINTS, inspect.signature(cls.from_pretrained).parameters)
        if trust_remote_code:
            raise InputError("trust_remote_code is True: expected False, since no code of a checkpoint is ever run")
        for name, value, expected in (
            ("use_safetensors", use_safetensors, "True, since pickles are never read"),
            ("low_cpu_mem_usage", low_cpu_mem_usage, "True, since weights are never initialised before they are read"),
        ):
            if value is False:
                raise InputError(f"{name} is False: expected {expected}")
        if torch_dtype is not None and dtype is not None:
            raise InputError("got both of torch_dtype and dtype: expected one of them")
        dtypes = _check_dtypes(torch_dtype if dtype is None else dtype)
        device = None if device_map is None else _device_of(device_map)
        low = LowMemory.of(low_memory)
        if low is not None and device is not None:
            raise InputError("got both of low_memory and device_map: expected one of them")
        given = {
            "transformer": transformer,
            "scheduler": scheduler,
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        given = {name: part for name, part in given.items() if part is not FROM_CHECKPOINT}
        check_parts(given)
        folder = resolve_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            without=[name for name in given if name != "scheduler"],
        )
        settings = CheckpointSettings.load(folder)
        if "scheduler" in given and "transformer" not in given and (folder / "scheduler").is_dir():
            settings = replace(settings, noise=TrainedNoise.of(load_scheduler(folder)))
        if "transformer" in given:
            settings = replace(settings, vocabulary=None)  # the words of the one that is not used
        if "text_encoder" in given:
            settings = replace(settings, text_encoder=None)  # the name of the one that is not used
        parts = load_parts(folder, given, lambda part: _dtype_of(part, dtypes), variant, head)
        pipe = cls(**parts, settings=settings)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        if device is not None:
            pipe.to(device)
        if low is not None:
            enable_low_memory(pipe, low.device, low.text_encoder, low.tiled)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None, **parts: Any) -> Self:
        """A pipeline of another's parts and settings, or of parts given in their place. No weight is copied.

        Unlike diffusers' own, it leaves the dtype as it is unless one is given: the parts belong to both.
        """
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        refuse_keywords("from_pipe", [name for name in parts if name not in names], OPEN_HINTS, names)
        own = {name: part for name, part in pipeline.components.items() if name in names}
        if missing := [name for name in ("transformer", "scheduler") if name not in own | parts]:
            raise InputError(f"{type(pipeline).__name__} has no {missing[0]}: expected it to be given")
        pipe = cls(**own | parts)
        if (place := getattr(pipeline.config, "_name_or_path", None)) is not None:
            pipe.register_to_config(_name_or_path=place)
        return pipe if torch_dtype is None else pipe.to(dtype=torch_dtype)

    def to(self, *args: Any, **options: Any) -> Self:
        """diffusers' own: a device, a dtype or both. A device that is not there is an InputError."""
        place = options.get("device", args[0] if args else None)
        if isinstance(place, str | int | torch.device):
            _device_of(place, "device")
        return super().to(*args, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write every part as safetensors, `nova.json` and a card: a folder that `from_pretrained` opens.

        With `push_to_hub` it goes to the Hub as well, as `repo_id` or by the folder's name.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise InputError("safe_serialization is False: expected True, since pickles are never written")
        known = ("private", "token", "commit_message", "create_pr")
        refuse_keywords("save_pretrained", [name for name in hub if not push_to_hub or name not in known], {}, known)
        check_scheduler(self.scheduler, self.trained_noise)
        if names := adapter_names(self.transformer):
            raise InputError(
                f"the transformer has adapters ({', '.join(names)}): expected them unloaded before it is saved, and "
                "fused before that if they are to be in it"
            )
        for part in ("transformer", "vae", "text_encoder"):
            if getattr(self, part) is not None:
                base = TRANSFORMERS_WEIGHTS if part == "text_encoder" else DIFFUSERS_WEIGHTS
                for path in index_or_single(folder / part, base, variant):  # an older save may have the other of both
                    path.unlink(missing_ok=True)
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        for path in folder.rglob("*.safetensors"):
            make_readable(path)
        self.settings.save(folder)
        name = repo_id or folder.resolve().name
        if not (folder / CARD).exists():
            (folder / CARD).write_text(self._card(name), encoding="utf-8")
        if push_to_hub:
            _upload(folder, name, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> str:
        """Save to a repository of the Hugging Face Hub, with a card that tells how to open it. Returns its URL."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            self.save_pretrained(place, safe_serialization, variant)
            (place / CARD).write_text(self._card(repo_id), encoding="utf-8")
            return _upload(
                place, repo_id, commit_message=commit_message, private=private, token=token, create_pr=create_pr
            )

    def _card(self, name: str) -> str:
        """The card of this model, with what the card of the one that it was opened from says."""
        place = getattr(self.config, "_name_or_path", None)
        base = None if place is None else str(place)
        facts: dict[str, Any] = {}
        if base is not None and Path(base).is_dir():
            facts, base = card_facts(Path(base)), Path(base).resolve().name
        kind = "text-to-video" if self.capabilities.video else "text-to-image"
        return pipeline_card(name, kind, base, facts)


def _upload(folder: Path, repo_id: str, *, create_pr: bool = False, **options: Any) -> str:
    """A folder to a repository of the Hub, which is made if need be; its URL."""
    told = {name: value for name, value in options.items() if value is not None}
    message = told.pop("commit_message", "Upload NovaPipeline")
    repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True, **told).repo_id
    commit = huggingface_hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        create_pr=create_pr,
        token=told.get("token"),
    )
    return str(commit)


def _device_of(device_map: object, name: str = "device_map") -> torch.device:
    """The one device that the argument `name` names; strategies that spread parts over several are refused."""
    place = f"cuda:{device_map}" if type(device_map) is int else device_map
    if isinstance(place, str | torch.device) and place not in ("auto", "balanced", "balanced_low_0"):
        try:
            device = torch.device(place)
        except RuntimeError:
            raise InputError(f"{name} is {device_map!r}: expected a device such as 'cuda'") from None
        return choose_device(str(device))
    raise InputError(
        f"{name} is {device_map!r}: expected one device such as 'cuda'; parts are not spread over several, and"
        " low_memory=True lets them take turns on a small GPU"
    )


def _check_dtypes(dtypes: Any) -> Dtypes:
    for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise InputError(f"torch_dtype is {dtype!r}: expected a dtype such as torch.float16, or a dict of them")
    checked: Dtypes = dtypes
    return checked


def _dtype_of(part: str, torch_dtype: Dtypes) -> torch.dtype | None:
    if isinstance(torch_dtype, dict):
        return torch_dtype.get(part, torch_dtype.get("default"))
    return torch_dtype
