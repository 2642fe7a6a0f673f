# The orchestrator. `deploy/images.sh` builds it; by hand, from the root of the repository:
#
#   docker build -f deploy/orchestrator.Dockerfile -t engine-orchestrator:dev .
#
# BASE needs Python 3.11 or later; BUILDER the same Python with pip and venv, and a way to a package index.
ARG BASE=python:3.12-slim
ARG BUILDER=python:3.12-slim

FROM ${BUILDER} AS build
ARG PIP_INDEX_URL
# The build host's certificates, where it has its own (deploy/images.sh puts them there); they stay in this stage.
COPY LICENSE deploy/ca-certificates.crt* /src/ca/
COPY pyproject.toml requirements.lock README.md LICENSE /src/
COPY deploy/lock_subset.py /src/deploy/
RUN python3 -m venv --without-pip /opt/venv && python3 -m venv --without-pip /opt/tools \
 && python3 /src/deploy/lock_subset.py > /src/orchestrator.lock \
 && python3 /src/deploy/lock_subset.py setuptools > /src/tools.lock \
 && if [ -f /src/ca/ca-certificates.crt ]; then export PIP_CERT=/src/ca/ca-certificates.crt; fi \
 && for part in venv:orchestrator tools:tools; do \
      python3 -m pip --python "/opt/${part%:*}/bin/python" install --no-cache-dir --disable-pip-version-check --quiet \
        --only-binary :all: --require-hashes -r "/src/${part#*:}.lock" || exit 1; \
    done
COPY engine /src/engine
COPY orchestrator /src/orchestrator
RUN python3 -m pip --python /opt/tools/bin/python wheel --quiet --no-deps --no-index --no-build-isolation \
      --wheel-dir /src/wheels /src \
 && python3 -m pip --python /opt/venv/bin/python install --quiet --no-deps --no-index /src/wheels/*.whl \
 && /opt/venv/bin/python -m compileall -q /opt/venv/lib && mkdir /opt/data

FROM ${BASE}
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=10001:10001 /opt/data /data
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORCH_DATA_ROOT=/data \
    ORCH_HOST=0.0.0.0 \
    ORCH_PORT=8000
USER 10001:10001
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-I", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['ORCH_PORT'] + '/health', timeout=4)"]
CMD ["orchestrator", "serve"]
