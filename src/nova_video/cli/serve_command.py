"""`nova serve`: a model behind an API, a page and live streams, until Ctrl-C or SIGTERM.

Nothing heavy is imported before the flags are checked.
"""

import sys
from dataclasses import replace

from nova_video.cli.arguments import Serve, model_of
from nova_video.cli.console import pipeline_of
from nova_video.cli.flags import given_options
from nova_video.serving.settings import ServeSettings


def run_serve(args: Serve) -> None:
    """Prints the address once it listens. Whatever is wrong with the flags is found before the model is loaded."""
    settings = ServeSettings(**given_options(args, ServeSettings))
    from nova_video.serving.guard import ApiKeys, known_origins
    from nova_video.serving.logs import write_lines
    from nova_video.serving.server import open_socket, url_of

    known_origins(settings)
    keys = ApiKeys.read(settings.api_key)
    with open_socket(settings) as sock:
        settings = replace(settings, port=sock.getsockname()[1])
        pipe = pipeline_of(args)
        from nova_video.serving.launch import serve
        from nova_video.serving.service import JobService

        service = JobService(pipe, settings, model_of(args))
        write_lines(settings)
        print(url_of(sock), flush=True)
        print("nova: Ctrl-C ends the server; jobs that run go on at its next start", file=sys.stderr, flush=True)
        try:
            serve(service, settings, sock, keys)
        except KeyboardInterrupt:  # uvicorn raises the signal again after a good end
            return
