"""The process of `nova serve`: listens, refuses slow senders of headers, and ends so that nothing is lost."""

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nova_video.common.errors import InputError, first_line
from nova_video.serving.guard import Refusal
from nova_video.serving.logs import log_event
from nova_video.serving.serve_settings import ServeSettings

LONGEST_HEAD = 32 * 1024
CLOSING_SECONDS = 5
"""Time that open connections have to end after the jobs were saved."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 of one connection. A head that does not come in time is answered 408, so that none is held open."""

    patience = 20.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._upgraded = False
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._upgraded = True
        self._watch()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade(event)

    def _watch(self) -> None:
        """Keeps the timer running exactly while a request is awaited."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if (answering or self._upgraded) and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not answering and not self._upgraded and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.patience, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._answer(Refusal(408, "the head of the request did not come in time", "request_timeout"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._answer(Refusal(400, f"{msg.rstrip('.')}: expected HTTP/1.1", "invalid_http"))

    def _answer(self, refusal: Refusal) -> None:
        """Sends an answer before there is a whole request, and closes the connection."""
        body = refusal.body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=refusal.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()


def protocol_class(patience: float) -> type[PatientProtocol]:
    """The protocol with its time-out, as uvicorn makes one itself for each connection."""
    return type("PatientProtocol", (PatientProtocol,), {"patience": patience})


class ServerProcess(uvicorn.Server):
    """uvicorn, which saves the running jobs before it closes connections."""

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], None], grace: float) -> None:
        super().__init__(config)
        self.on_end = on_end
        self.grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log_event("shutdown")
        ending = threading.Thread(target=self.on_end, daemon=True)  # a set that never ends does not keep the process
        ending.start()
        await asyncio.to_thread(ending.join, self.grace)
        if ending.is_alive():
            log_event("shutdown is late: a running set did not end; its job goes on from the frame before it")
        await super().shutdown(sockets)


def open_socket(settings: ServeSettings) -> socket.socket:
    """The socket to listen on; InputError says why there is none."""
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        place = f"{settings.host} port {settings.port}"
        raise InputError(f"cannot listen on {place}: {first_line(getattr(error, 'strerror', None) or error)}") from None


def url_of(sock: socket.socket) -> str:
    """The address of a server for a browser on this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Any, settings: ServeSettings, on_end: Callable[[], None] = lambda: None) -> ServerProcess:
    """A server of the application, which `run(sockets=[...])` starts."""
    config = uvicorn.Config(
        app,
        http=protocol_class(settings.patience),
        ws="websockets-sansio",
        ws_max_size=int(settings.body_mb * 1e6),
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        h11_max_incomplete_event_size=LONGEST_HEAD,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return ServerProcess(config, on_end, settings.grace)
