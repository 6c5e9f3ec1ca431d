"""An answer over HTTP that grows while a job runs, to a client that may be slow, silent or gone."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEARTBEAT_SECONDS = 15.0
"""After so long without news, a heartbeat shows whether the client is still there."""
STALL_SECONDS = 60.0
"""A client that takes nothing for so long is dropped."""
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class LiveResponse(Response):
    """Sends parts as they come. No more than one part waits for a slow client, and a client that left frees all."""

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        media_type: str,
        heartbeat: bytes = b"",
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        super().__init__(media_type=media_type, headers=HEADERS)
        del self.headers["content-length"]
        self.parts = parts
        self.heartbeat = heartbeat
        self.heartbeat_seconds = heartbeat_seconds
        self.stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tasks = {asyncio.ensure_future(self._send_parts(send)), asyncio.ensure_future(_wait_until_gone(receive))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.parts.aclose()
        for task in done:
            with suppress(TimeoutError, OSError):  # the client stalled or left: there is nobody to tell
                task.result()

    async def _send_parts(self, send: Send) -> None:
        part = asyncio.ensure_future(anext(self.parts))
        try:
            while True:
                done, _ = await asyncio.wait({part}, timeout=self.heartbeat_seconds)
                if not done:
                    await self._send(send, self.heartbeat)
                    continue
                try:
                    body = part.result()
                except StopAsyncIteration:
                    break
                await self._send(send, body)
                part = asyncio.ensure_future(anext(self.parts))
        finally:
            part.cancel()
            await asyncio.gather(part, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        if body:
            message = {"type": "http.response.body", "body": body, "more_body": True}
            await asyncio.wait_for(send(message), self.stall_seconds)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
