#!/usr/bin/env bash
# Builds the images `september-engine:dev` and `engine-orchestrator:dev`.
#
#   deploy/images.sh [--progress] [engine] [orchestrator]   default: both; with what the builds say
#   deploy/images.sh --check [engine] [orchestrator]        builds nothing; exit code 0 when they are there and were
#                                                           made from these sources, or by somebody else
#
# BASE_IMAGE, BUILDER_IMAGE   what to build on; the second needs pip and venv, default: the first.
#                             Without them python:3.12-slim where its registry answers, else a base made from
#                             Debian's packages (deploy/base-image.sh).
# ENGINE_TAG, ORCHESTRATOR_TAG   other names for the results.
# PIP_INDEX_URL               another package index.
set -euo pipefail
cd "$(dirname "$0")/.."

check=
progress=
while :; do
  case ${1:-} in
    --check) check=yes ;;
    --progress) progress=yes ;;
    -*) sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done

made_from=(engine pyproject.toml requirements.lock LICENSE deploy/lock_subset.py)
source_label=engine-orchestrator.source
digest() { # image: the sources of it in one word
  local sources=("${made_from[@]}" "deploy/$1.Dockerfile")
  [ "$1" = engine ] || sources+=(orchestrator README.md)
  find "${sources[@]}" -name __pycache__ -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum |
    sha256sum | cut -c1-16
}
up_to_date() { # image, tag
  local label
  label=$(docker image inspect --format "{{index .Config.Labels \"$source_label\"}}" "$2" 2>/dev/null) || return 1
  [ -z "$label" ] || [ "$label" = "$(digest "$1")" ]
}

tag_of() {
  case $1 in
    engine) echo "${ENGINE_TAG:-september-engine:dev}" ;;
    orchestrator) echo "${ORCHESTRATOR_TAG:-engine-orchestrator:dev}" ;;
    *) echo "unknown image '$1'" >&2; exit 2 ;;
  esac
}
[ $# -gt 0 ] || set -- engine orchestrator
if [ -n "$check" ]; then
  for image in "$@"; do
    tag=$(tag_of "$image")
    up_to_date "$image" "$tag" || { echo "$tag: to be built"; exit 1; }
  done
  exit 0
fi

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

build() { # image, tag
  # The classic builder does as well; the host's network, since a build may need the host's way to the index.
  local command=(docker build --network host
    --build-arg BASE="$base" --build-arg BUILDER="$builder" ${PIP_INDEX_URL:+--build-arg PIP_INDEX_URL}
    --label "$source_label=$(digest "$1")"
    --file "$context/deploy/$1.Dockerfile" --tag "$2" "$context")
  export DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0}
  if [ -n "$progress" ]; then
    "${command[@]}" 2>&1
  else
    "${command[@]}" --quiet 2>"$context/said" >/dev/null || { cat "$context/said" >&2; return 1; }
  fi
  local size below
  size=$(docker image inspect --format '{{.Size}}' "$2")
  below=$(docker image inspect --format '{{.Size}}' "$base")
  echo "$2: $(numfmt --to=si "$size")B, $(numfmt --to=si $((size - below)))B over $base"
}

for image in "$@"; do
  tag=$(tag_of "$image")
  build "$image" "$tag"
done
