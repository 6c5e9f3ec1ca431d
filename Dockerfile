# syntax=docker/dockerfile:1
# Serves a model: see docs/serving.md.
#   docker build -t nova-video .                                  # for a processor
#   docker build -t nova-video:cuda --build-arg DEVICE=cuda .     # for an NVIDIA GPU
FROM python:3.11-slim

# Kernels for a GPU are compiled at the first use of a model, which needs a C compiler.
ARG DEVICE=cpu
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    elif [ "$DEVICE" != cpu ]; then \
        echo "DEVICE is $DEVICE: expected cpu or cuda" >&2; exit 1; \
    fi

WORKDIR /opt/nova-video
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    index=https://pypi.org/simple; \
    if [ "$DEVICE" = cpu ]; then index=https://download.pytorch.org/whl/cpu; fi; \
    pip install --constraint constraints.txt --index-url "$index" torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src ./src
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[demo,serve]'

# Nothing of the server belongs to root. Jobs and results are in the volume.
RUN useradd --system --uid 10001 --home-dir /var/lib/nova-video --create-home nova
USER nova
VOLUME /var/lib/nova-video
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["nova", "serve", "--host", "0.0.0.0", "--port", "8000", "--folder", "/var/lib/nova-video/serve"]
