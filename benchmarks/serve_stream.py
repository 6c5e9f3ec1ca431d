"""Compares the stream of a server with that of `pipe.stream`: `python benchmarks/serve_stream.py --help`.

The same clip is made by both in turn. The server is in this process, and its clip is read over a socket as an mp4 that
grows. Results are written as JSON, with device, versions and command.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from result_file import result_of, write_result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from nova_video import NovaPipeline
from nova_video.bench.configs import SIZES, TEXT_DIM, TEXT_LEN, build, resize_model
from nova_video.bench.server_client import ServerClient
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.io.pixels import to_bytes
from nova_video.serving.launch import guarded_app
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of
from nova_video.serving.service import JobService


@dataclass(frozen=True)
class ServeStream:
    """Time a clip of the server, and of `pipe.stream`."""

    output: Path = Path(__file__).parent / "measured" / "serve_stream.json"
    """JSON file to write."""
    model: str = "t2v-480-0.6b"
    """A released size of `nova bench sample` with random weights, or a checkpoint."""
    size: tuple[int, int] | None = None
    """Height and width of a released size in pixels, if others."""
    preset: str = "exact"
    num_frames: int | None = None
    rounds: int = 5
    """Clips of each that count; one more before them does not."""
    device: str = "auto"


def main(args: ServeStream) -> None:
    device = choose_device(args.device)
    pipe = open_model(args, device)
    options = {"prompt": "a whale moving left", "preset": args.preset, "num_frames": args.num_frames}
    options = {name: value for name, value in options.items() if value is not None}
    rounds: list[dict[str, float]] = []
    with serving(pipe) as client:
        for seed in range(args.rounds + 1):
            timed = {"pipe": time_pipe(pipe, options | {"seed": seed})}
            timed["server"], timed["server_first"] = time_server(client, options | {"seed": seed})
            rounds += [timed] if seed else []
    medians = {name: round(statistics.median(each[name] for each in rounds), 4) for name in rounds[0]}
    loss = round(100 * (medians["server"] / medians["pipe"] - 1), 1)
    result = result_of(
        "serve_stream", device, model=args.model, options=options, seconds=medians, more_percent=loss, rounds=rounds
    )
    write_result(args.output, result)
    print(json.dumps(result, indent=2))


def open_model(args: ServeStream, device: torch.device) -> NovaPipeline:
    """The pipeline; a released size gets a small text encoder with random weights."""
    dtype = choose_dtype("auto", device)
    if args.model in SIZES:
        size = SIZES[args.model]
        pipe = build(resize_model(size, *args.size) if args.size else size, device, dtype)
        pipe = NovaPipeline(**pipe.components | random_text_encoder(device, dtype))
    else:
        pipe = NovaPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_text_encoder(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A text encoder of one layer, as wide as the released one, whose words are letters."""
    letters = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    words = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=TEXT_LEN)
    config = BertConfig(
        vocab_size=len(letters),
        hidden_size=TEXT_DIM,
        num_hidden_layers=1,
        num_attention_heads=20,
        intermediate_size=TEXT_DIM,
    )
    return {"text_encoder": BertModel(config).to(device, dtype).eval(), "tokenizer": tokenizer}


@contextmanager
def serving(pipe: NovaPipeline) -> Iterator[ServerClient]:
    """A client of a server of the pipeline, which ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ServeSettings(folder=folder, port=0)
        service = JobService(pipe, settings, "measured")
        made, sock = guarded_app(service, settings), open_socket(settings)
        server = make_server(made.app, settings, made.close)
        thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
        made.start()
        thread.start()
        try:
            yield ServerClient(url_of(sock))
        finally:
            server.should_exit = True
            thread.join()


def time_pipe(pipe: NovaPipeline, options: dict[str, Any]) -> float:
    """Seconds until the last frame of `pipe.stream`, as bytes."""
    start = time.perf_counter()
    for frame in pipe.stream(output_type="np", **options):
        to_bytes(frame)
    return time.perf_counter() - start


def time_server(client: ServerClient, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds until the last byte of the server's live mp4, and until the first fragment."""
    start, first = time.perf_counter(), None
    job = client.create_video(options)
    with client.send("GET", f"/v1/videos/{job['id']}/live.mp4") as answer:
        pieces = 0
        while answer.read1(1 << 20):
            pieces += 1
            if pieces == 2:  # the head came first
                first = time.perf_counter() - start
    total = time.perf_counter() - start
    assert first is not None
    return total, first


if __name__ == "__main__":
    main(tyro.cli(ServeStream))
