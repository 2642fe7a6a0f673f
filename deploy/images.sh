#!/usr/bin/env bash
# Builds the images `september-engine:dev` and `engine-orchestrator:dev`.
#
#   deploy/images.sh [engine] [orchestrator]      default: both
#
# BASE_IMAGE, BUILDER_IMAGE   what to build on; the second needs pip and venv, default: the first.
#                             Without them python:3.12-slim where its registry answers, else a base made from
#                             Debian's packages (deploy/base-image.sh).
# ENGINE_TAG, ORCHESTRATOR_TAG   other names for the results.
# PIP_INDEX_URL               another package index.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${BASE_IMAGE:-}
builder=${BUILDER_IMAGE:-$base}
if [ -z "$base" ]; then
  base=python:3.12-slim
  builder=${BUILDER_IMAGE:-$base}
  if docker image inspect engine-orchestrator-base:dev >/dev/null 2>&1 ||
    ! { docker image inspect "$base" >/dev/null 2>&1 || timeout 300 docker pull --quiet "$base" >/dev/null 2>&1; }; then
    base=engine-orchestrator-base:dev
    builder=engine-orchestrator-builder:dev
    deploy/base-image.sh "$base" # a present one is kept when it is up to date
    deploy/base-image.sh "$builder" python3-venv python3-pip
  fi
fi

# A context of its own: nothing but what the images are made of, whatever lies in the work tree.
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir "$context/deploy"
tar -c --exclude=__pycache__ engine orchestrator pyproject.toml requirements.lock README.md LICENSE \
  deploy/lock_subset.py deploy/engine.Dockerfile deploy/orchestrator.Dockerfile | tar -x -C "$context"
for bundle in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}"; do
  if [ -n "$bundle" ] && [ -f "$bundle" ]; then
    cp "$bundle" "$context/deploy/ca-certificates.crt"
    break
  fi
done

build() { # Dockerfile, tag
  # The classic builder does as well; the host's network, since a build may need the host's way to the index.
  DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} docker build --quiet --network host \
    --build-arg BASE="$base" --build-arg BUILDER="$builder" ${PIP_INDEX_URL:+--build-arg PIP_INDEX_URL} \
    --file "$context/deploy/$1.Dockerfile" --tag "$2" "$context" 2>"$context/said" >/dev/null ||
    { cat "$context/said" >&2; return 1; }
  local size below
  size=$(docker image inspect --format '{{.Size}}' "$2")
  below=$(docker image inspect --format '{{.Size}}' "$base")
  echo "$2: $(numfmt --to=si "$size")B, $(numfmt --to=si $((size - below)))B over $base"
}

[ $# -gt 0 ] || set -- engine orchestrator
for image in "$@"; do
  case $image in
    engine) build engine "${ENGINE_TAG:-september-engine:dev}" ;;
    orchestrator) build orchestrator "${ORCHESTRATOR_TAG:-engine-orchestrator:dev}" ;;
    *) echo "unknown image '$image'" >&2; exit 2 ;;
  esac
done
