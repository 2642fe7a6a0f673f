# The reference engine. `deploy/images.sh` builds it; by hand, from the root of the repository:
#
#   docker build -f deploy/engine.Dockerfile -t september-engine:dev .
#
# BASE needs Python 3.11 or later; BUILDER the same Python with pip and venv, and a way to a package index.
ARG BASE=python:3.12-slim
ARG BUILDER=python:3.12-slim

FROM ${BUILDER} AS build
ARG PIP_INDEX_URL
# The build host's certificates, where it has its own (deploy/images.sh puts them there); they stay in this stage.
COPY LICENSE deploy/ca-certificates.crt* /src/ca/
COPY pyproject.toml requirements.lock /src/
COPY deploy/lock_subset.py /src/deploy/
RUN python3 -m venv --without-pip /opt/venv \
 && python3 /src/deploy/lock_subset.py uvicorn uvloop httptools orjson httpx > /src/engine.lock \
 && if [ -f /src/ca/ca-certificates.crt ]; then export PIP_CERT=/src/ca/ca-certificates.crt; fi \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --quiet \
      --only-binary :all: --require-hashes -r /src/engine.lock
COPY engine /opt/app/engine
# Compiled here: in a container nobody may write there.
RUN /opt/venv/bin/python -m compileall -q /opt/app /opt/venv/lib && mkdir /opt/data

FROM ${BASE}
# The sandbox of the tool `bash`; a base made by deploy/base-image.sh has it already.
RUN command -v bwrap >/dev/null || { apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap \
 && rm -rf /var/lib/apt/lists/*; }
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/app /opt/app
# The mount point of the engine's volume, which takes over its owner.
COPY --from=build --chown=10001:10001 /opt/data /data
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SQLITE_DB_PATH=/data/brain.sqlite \
    HOST=0.0.0.0 \
    PORT=8000
USER 10001:10001
WORKDIR /data
EXPOSE 8000
# No HEALTHCHECK: each check would be a process; the orchestrator asks over HTTP.
CMD ["python", "-P", "-m", "engine"]
