"""The application: the routes over one `JobService`, with their errors in one form."""

import time
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request

from nova_video.serving import realtime, routes_docs, routes_images, routes_live, routes_page, routes_videos
from nova_video.serving.answers import ErrorAnswer, ModelList, ModelObject, add_error_handlers
from nova_video.serving.realtime import Seats
from nova_video.serving.routing import Service
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.service import JobService, NotFoundError

ABOUT = """Text, pictures and clips to pictures and videos, made frame by frame by an autoregressive model.

The routes speak the dialect of OpenAI's API that open video servers have: `openai.OpenAI(base_url=".../v1")` works.
Every setting of `nova generate` is a word of a request, under the same name."""

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="Names the loaded model")
def list_models(request: Request) -> ModelList:
    return ModelList(data=[_model(request)])


@router.get("/{name:path}", summary="Tells of the loaded model", responses={404: {"model": ErrorAnswer}})
def get_model(request: Request, service: Service, name: str) -> ModelObject:
    if name != service.model:
        raise NotFoundError(f"there is no model {name!r}: expected {service.model}, the one that is loaded")
    return _model(request)


def _model(request: Request) -> ModelObject:
    return ModelObject(id=request.app.state.service.model, created=int(request.app.state.started_at))


def create_app(service: JobService, settings: ServeSettings | None = None) -> FastAPI:
    """The application of one service. Whoever runs it starts and closes the service, and puts the guard before it."""
    app = FastAPI(title="nova-video", version=version("nova-video"), description=ABOUT, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.started_at = time.time()
    app.state.seats = Seats()
    add_error_handlers(app)
    app.include_router(router)
    for pages in (routes_images, routes_videos, routes_live, realtime, routes_page, routes_docs):
        app.include_router(pages.router)
    return app
