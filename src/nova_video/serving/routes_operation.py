"""Routes for those who run a server: /healthz, /readyz and /metrics."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from nova_video.serving.metrics import ServerMetrics
from nova_video.serving.readiness import Readiness


def operation_router(readiness: Readiness, metrics: ServerMetrics) -> APIRouter:
    """The three routes, of one server."""
    router = APIRouter(tags=["operation"])

    @router.get("/healthz", summary="Tells that the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", summary="Tells whether jobs are taken and worked off, and if not, why")
    def readyz() -> JSONResponse:
        problem = readiness.problem()
        if problem is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": problem}, 503, {"retry-after": "5"})

    @router.get("/metrics", summary="Measures in the text form of Prometheus", response_class=Response)
    def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
