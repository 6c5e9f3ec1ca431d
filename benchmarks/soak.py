"""A long day of a server in some minutes: `python benchmarks/soak.py --help` (`make soak`).

Begins servers of its own, on this machine alone, and lets many clients ask at once, watch, go away in the middle, and
lets the process be killed. Each part is a row: what was done, what was seen, and whether that is what it should be.
Prints each as soon as it is there, writes those so far as JSON, and ends with code 1 if one is not as it should be.
"""

import base64
import io
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from result_file import result_of, write_result

from nova_video import NovaPipeline
from nova_video.bench.server_client import OwnServer, ServerClient, ServerError, as_form, own_server
from nova_video.common.errors import InputError
from nova_video.io.pixels import to_bytes

SENTENCES = (
    "a panda growing on a green background",
    "a red apple moving left on a blue background",
    "a whale moving right on a white background",
    "a rocket moving up on a black background",
)
PARTS = ("mixed", "viewers", "kills", "disconnects", "memory")
GROWTH = 0.02
"""Most that the memory of a server may grow, as a share."""


@dataclass(frozen=True)
class Soak:
    """Soak a server."""

    output: Path = Path("benchmarks/measured/soak.json")
    """JSON file to write."""
    model: str = "emoji"
    parts: tuple[str, ...] = PARTS
    """Parts to run, of mixed, viewers, kills, disconnects and memory."""
    clients: int = 16
    requests: int = 200
    """Requests of all clients together, in the part mixed."""
    viewers: int = 8
    watched_frames: int = 81
    """Frames of the clip that they watch."""
    kills: int = 10
    disconnects: int = 50
    small: int = 1000
    """Requests of the part memory."""
    sets: int = 4
    """Sets of each request, few for speed."""
    diffusion_steps: int = 4
    device: str = "auto"


@dataclass(frozen=True)
class SoakRow:
    """One part: what was asked of the server, and what was seen."""

    part: str
    passed: bool
    seconds: float
    seen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wish:
    """One request of the part mixed."""

    kind: str
    fields: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


def main(args: Soak) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers that were begun are ended
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        raise InputError(f"parts has {unknown[0]}: expected some of {', '.join(PARTS)}")
    runs: dict[str, Callable[[Soak], dict[str, Any]]] = {
        "mixed": run_mixed,
        "viewers": run_viewers,
        "kills": run_kills,
        "disconnects": run_disconnects,
        "memory": run_memory,
    }
    rows: list[dict[str, Any]] = []
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    result = result_of("soak", device, model=args.model, rows=rows)
    for part in args.parts:
        began = time.monotonic()
        try:
            seen = runs[part](args)
        except (InputError, OSError) as error:
            seen = {"wrong": [f"{type(error).__name__}: {error}"]}
        row = SoakRow(part, not seen.get("wrong"), round(time.monotonic() - began, 1), seen)
        rows.append(asdict(row))
        print(
            f"{part:12}{'as it should be' if row.passed else 'WRONG':17}{row.seconds:7.1f} s  {told(seen)}", flush=True
        )
        write_result(args.output, result)
    print(args.output)
    return 0 if all(row["passed"] for row in rows) else 1


def told(seen: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in seen.items()
    )


def flags(args: Soak, *more: str) -> list[str]:
    return ["--model", args.model, "--device", args.device, "--queue", "1000", "--queue-per-key", "1000", *more]


# Many clients ---------------------------------------------------------------------------------------------------------


def run_mixed(args: Soak) -> dict[str, Any]:
    """Requests of every kind from many clients: none lost, none doubled, each as it is alone."""
    wishes = [make_wish(number, args) for number in range(args.requests)]
    with own_server(flags(args, "--batch", "1")) as server:
        client = server.client
        began = time.monotonic()
        with ThreadPoolExecutor(args.clients) as pool:
            crowd = list(pool.map(lambda wish: fulfil(client, wish), wishes))
        seconds = time.monotonic() - began
        ids = [id for id, _ in crowd if id is not None]
        kept = all_videos(client)
        alone = [fulfil(client, wish)[1] for wish in wishes]
    wrong = []
    if len(set(ids)) != len(ids):
        wrong.append(f"{len(ids) - len(set(ids))} ids are there twice")
    if sorted(kept) != sorted(ids):
        wrong.append(f"{len(kept)} videos are kept: expected {len(ids)}")
    if different := [wish.kind for wish, (_, one), other in zip(wishes, crowd, alone, strict=True) if one != other]:
        wrong.append(f"{len(different)} are not as they are alone: {', '.join(sorted(set(different)))}")
    same = compare_with_library(args, wishes, crowd)
    if same is not None:
        wrong.append(same)
    kinds = {kind: sum(wish.kind == kind for wish in wishes) for kind in sorted({wish.kind for wish in wishes})}
    return {
        "requests": len(wishes),
        "clients": args.clients,
        **kinds,
        "per_second": round(len(wishes) / seconds, 3),
        "as_alone": len(wishes) - len(different),
        "wrong": wrong,
    }


def make_wish(number: int, args: Soak) -> Wish:
    """The request of a number: its kind, length, sentence and seed follow from it."""
    chance = random.Random(number)
    fields: dict[str, Any] = {"prompt": SENTENCES[number % len(SENTENCES)], "seed": number}
    fields |= {"sets": args.sets, "diffusion_steps": args.diffusion_steps}
    kind = ("video", "image", "video", "from image", "video", "edit")[number % 6]
    if kind == "image":
        return Wish(kind, fields)
    fields["num_frames"] = chance.choice((5, 9, 17))
    if kind == "from image":
        return Wish(kind, fields, {"input_reference": as_png(chance)})
    if kind == "edit":
        del fields["num_frames"]
        mask = np.zeros((128, 128), np.uint8)
        mask[:, 64:] = 255
        return Wish(kind, fields, {"image": as_png(chance), "mask": png(Image.fromarray(mask))})
    return Wish(kind, fields)


def as_png(chance: random.Random) -> bytes:
    return png(Image.new("RGB", (128, 128), tuple(chance.randrange(256) for _ in range(3))))


def png(image: Image.Image) -> bytes:
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()


def fulfil(client: ServerClient, wish: Wish) -> tuple[str | None, bytes]:
    """The id of a request's job, if it has one, and the bytes of its result."""
    if wish.kind == "image":
        return None, picture_of(ask_patiently(client, "/v1/images/generations", json.dumps(wish.fields).encode()))
    if wish.kind == "edit":
        return None, picture_of(ask_patiently(client, "/v1/images/edits", *as_form(wish.fields, wish.files)))
    job = client.create_video(wish.fields, wish.files)
    done = client.wait(job["id"])
    if done["status"] != "completed":
        raise InputError(f"{job['id']} is {done['status']}: {done.get('error')}")
    return job["id"], client.read("GET", f"/v1/videos/{job['id']}/content")


def ask_patiently(client: ServerClient, path: str, body: bytes, kind: str = "application/json") -> dict[str, Any]:
    while True:
        try:
            return dict(json.loads(client.read("POST", path, body, kind)))
        except ServerError as error:
            if error.status != 429:
                raise
            time.sleep(error.retry_after)


def picture_of(answer: Mapping[str, Any]) -> bytes:
    (picture,) = answer["data"]
    return base64.b64decode(picture["b64_json"])


def all_videos(client: ServerClient) -> list[str]:
    """The ids of all videos, page by page."""
    found, after = list[str](), ""
    while True:
        page = client.ask("GET", f"/v1/videos?limit=100{after}")
        found += [video["id"] for video in page["data"]]
        if not page["has_more"]:
            return found
        after = f"&after={page['last_id']}"


def compare_with_library(args: Soak, wishes: list[Wish], crowd: list[tuple[str | None, bytes]]) -> str | None:
    """Whether the pictures of the crowd have the pixels that the library makes of the same settings."""
    pipe = NovaPipeline.from_pretrained(args.model)
    chosen = [(wish, data) for wish, (_, data) in zip(wishes, crowd, strict=True) if wish.kind == "image"][:8]
    for wish, data in chosen:
        made = to_bytes(np.asarray(pipe(**wish.fields, num_frames=1, output_type="np").images[0]))
        if not np.array_equal(made, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))):
            return f"the picture of seed {wish.fields['seed']} is not as in the library"
    return None


# Viewers --------------------------------------------------------------------------------------------------------------


def run_viewers(args: Soak) -> dict[str, Any]:
    """Many viewers of one stream, who come at different times: each sees the same bytes, and they cost little."""
    fields = {"prompt": SENTENCES[0], "seed": 1, "num_frames": args.watched_frames, "sets": args.sets}
    fields |= {"diffusion_steps": args.diffusion_steps}
    with own_server(flags(args)) as server:
        client = server.client
        seconds = {}
        for viewers in (0, args.viewers):
            began = time.monotonic()
            job = client.create_video({**fields, "seed": viewers})
            path = f"/v1/videos/{job['id']}/live.mp4"

            def watch(number: int, path: str = path) -> bytes:
                time.sleep(0.2 * number)
                return client.read("GET", path)

            with ThreadPoolExecutor(max(viewers, 1)) as pool:
                seen = list(pool.map(watch, range(viewers)))
            client.wait(job["id"])
            seconds[viewers] = time.monotonic() - began
    wrong = [] if len(set(seen)) == 1 and seen[0] else [f"{len(set(seen))} different streams: expected one"]
    return {
        "viewers": args.viewers,
        "bytes": len(seen[0]),
        "seconds_alone": round(seconds[0], 2),
        "seconds_watched": round(seconds[args.viewers], 2),
        "wrong": wrong,
    }


# Kills ----------------------------------------------------------------------------------------------------------------


def run_kills(args: Soak) -> dict[str, Any]:
    """The process is killed in the middle, again and again: the clips are those of a server that was not."""
    fields = {"prompt": SENTENCES[1], "num_frames": 41, "sets": args.sets, "diffusion_steps": args.diffusion_steps}
    fields["sets"] = max(args.sets, 16)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="nova-soak-") as folder:
        done: list[tuple[str, bytes]] = []
        ids: list[str] = []
        kills, seeds = 0, 0
        while kills < args.kills:
            with own_server(flags(args), folder) as server:
                while kills < args.kills and server.process.poll() is None:
                    running = [id for id in ids if server.client.ask("GET", f"/v1/videos/{id}")["status"] in RUNNING]
                    while len(running) < 2:
                        ids.append(server.client.create_video({**fields, "seed": seeds})["id"])
                        running.append(ids[-1])
                        seeds += 1
                    time.sleep(chance.uniform(0.05, 1.5))
                    server.end(signal.SIGKILL)
                    kills += 1
        with own_server(flags(args), folder) as server:
            for id in ids:
                ended = server.client.wait(id)
                if ended["status"] != "completed":
                    raise InputError(f"{id} is {ended['status']} after a kill: {ended.get('error')}")
                done.append((id, server.client.read("GET", f"/v1/videos/{id}/content")))
            kept = all_videos(server.client)
    with own_server(flags(args)) as server:
        alone = []
        for seed in range(seeds):
            job = server.client.wait(server.client.create_video({**fields, "seed": seed})["id"])
            alone.append(server.client.read("GET", f"/v1/videos/{job['id']}/content"))
    different = sum(one != other for (_, one), other in zip(done, alone, strict=True))
    wrong = [] if sorted(kept) == sorted(ids) else [f"{len(kept)} jobs are left: expected {len(ids)}"]
    wrong += [] if not different else [f"{different} clips are not as they are without a kill"]
    return {"kills": kills, "clips": len(ids), "byte_equal": len(done) - different, "wrong": wrong}


RUNNING = ("queued", "in_progress")


# Disconnects ----------------------------------------------------------------------------------------------------------


def run_disconnects(args: Soak) -> dict[str, Any]:
    """Clients that go away in the middle of asking, of watching and of following."""
    fields = {"prompt": SENTENCES[2], "seed": 3, "num_frames": 17, "sets": args.sets}
    fields |= {"diffusion_steps": args.diffusion_steps}
    with own_server(flags(args)) as server:
        client = server.client
        first = client.wait(client.create_video(fields)["id"])
        before = client.read("GET", f"/v1/videos/{first['id']}/content")
        files_before = open_files(server)
        ids = []
        for number in range(args.disconnects):
            go_away(client, number, fields, ids)
        for id in ids:
            if (ended := client.wait(id))["status"] != "completed":
                raise InputError(f"{id} is {ended['status']} though only its viewer went away: {ended.get('error')}")
        again = client.wait(client.create_video(fields)["id"])
        after = client.read("GET", f"/v1/videos/{again['id']}/content")
        time.sleep(1)
        files_after = open_files(server)
    wrong = [] if before == after else ["the next clip is not as it was before"]
    if files_after > files_before + 2:
        wrong.append(f"{files_after} files are open: expected about {files_before}")
    seen = {"disconnects": args.disconnects, "watched": len(ids), "open_files": [files_before, files_after]}
    return {**seen, "wrong": wrong}


def go_away(client: ServerClient, number: int, fields: Mapping[str, Any], ids: list[str]) -> None:
    """Begins something and closes the connection in the middle of it."""
    way = number % 4
    if way == 0:  # in the middle of a body
        host, port = client.url.removeprefix("http://").rsplit(":", 1)
        body, kind = as_form(fields, {})
        head = (
            f"POST /v1/videos HTTP/1.1\r\nhost: {host}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(head.encode() + body[: len(body) // 2])
        return
    job = client.create_video({**fields, "seed": number})
    ids.append(job["id"])
    path = {1: "/live.mp4", 2: "/events?previews=1", 3: ""}[way]
    answer = client.send("GET", f"/v1/videos/{job['id']}{path}")
    if way != 3:
        answer.read(100)
    answer.close()


def open_files(server: OwnServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


# Memory ---------------------------------------------------------------------------------------------------------------


def run_memory(args: Soak) -> dict[str, Any]:
    """Many small requests: what the process holds stays the same."""
    with own_server(flags(args)) as server:
        held = []
        share = max(1, args.small // 10)
        for number in range(args.small + 2 * share):  # the first fifth does not count
            body = {"prompt": SENTENCES[number % 4], "seed": number, "sets": 1, "diffusion_steps": 1}
            ask_patiently(server.client, "/v1/images/generations", json.dumps(body).encode())
            if number >= 2 * share - 1 and (number + 1) % share == 0:
                held.append(server.memory)
    growth = held[-1] / held[0] - 1
    wrong = [] if growth <= GROWTH else [f"memory grew by {100 * growth:.1f} %: expected at most {100 * GROWTH:.0f} %"]
    return {
        "requests": args.small,
        "mb": [round(each / 1e6, 1) for each in held],
        "growth": round(growth, 4),
        "wrong": wrong,
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Soak)))
