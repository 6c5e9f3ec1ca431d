"""`nova serve`: a model behind an API, a page and live streams, until Ctrl-C or SIGTERM.

Nothing heavy is imported before the flags are checked.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nova_video.cli.arguments import Serve, model_of
from nova_video.cli.console import pipeline_of
from nova_video.cli.flags import given_options
from nova_video.serving.replica_settings import ReplicaSettings
from nova_video.serving.serve_settings import ServeSettings

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_video.serving.guard import ApiKeys


def run_serve(args: Serve) -> None:
    """Prints the address once it listens. Whatever is wrong with the flags is found before the model is loaded."""
    settings = ServeSettings(**given_options(args, ServeSettings))
    replicas = ReplicaSettings(**given_options(args, ReplicaSettings))
    from nova_video.serving.guard import ApiKeys, known_origins
    from nova_video.serving.logs import write_lines
    from nova_video.serving.server import open_socket, url_of

    known_origins(settings)
    keys = ApiKeys.read(settings.api_key)
    with open_socket(settings) as sock:
        settings, url = replace(settings, port=sock.getsockname()[1]), url_of(sock)
        if replicas.engine == "ray":
            sock.close()  # Ray Serve listens there
            _serve_on_ray(args, settings, replicas, keys, url)
            return
        pipe = pipeline_of(args)
        from nova_video.serving.launch import serve
        from nova_video.serving.service import JobService

        service = JobService(pipe, settings, model_of(args))
        write_lines(settings)
        print(url, flush=True)
        print("nova: Ctrl-C ends the server; jobs that run go on at its next start", file=sys.stderr, flush=True)
        try:
            serve(service, settings, sock, keys)
        except KeyboardInterrupt:  # uvicorn raises the signal again after a good end
            return


def _serve_on_ray(args: Serve, settings: ServeSettings, replicas: ReplicaSettings, keys: "ApiKeys", url: str) -> None:
    """Serves by Ray until Ctrl-C or SIGTERM, or, on a cluster, until it is up."""
    from nova_video.serving.ray_app import served_on_ray, wait_for_end

    if settings.folder is not None and "://" not in settings.folder:
        settings = replace(settings, folder=str(Path(settings.folder).absolute()))
    device = args.device or "auto"
    opened = partial(_open_pipe, args)
    with served_on_ray(opened, model_of(args), settings, replicas, keys, device) as plan:
        print(url, flush=True)
        if replicas.ray is not None:
            return
        many = f"{plan.least}" if plan.least == plan.most else f"{plan.least} to {plan.most}"
        print(f"nova: {many} replicas; Ctrl-C ends them; jobs that run go on at the next start", file=sys.stderr)
        try:
            wait_for_end()
        except KeyboardInterrupt:
            return


def _open_pipe(args: Serve, device: str) -> "NovaPipeline":
    """Opens the model of a command on another device."""
    return pipeline_of(replace(args, device=device))
