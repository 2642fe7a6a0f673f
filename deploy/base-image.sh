#!/usr/bin/env bash
# Makes a small base image with Python from Debian's packages, where no image registry can be reached.
#
#   deploy/base-image.sh [NAME [PACKAGE …]]     default: engine-orchestrator-base:dev with python3
#
# Does nothing when the image exists and was made by this very script.
#
# Uses the mirror that apt is set up with. Needs a Docker Engine, and root or user namespaces for mmdebstrap.
set -euo pipefail

name=${1:-engine-orchestrator-base:dev}
# libstdc++6: compiled packages of Python's need it; bubblewrap: the sandbox of the engine's tool `bash`.
packages=python3,ca-certificates,libstdc++6,bubblewrap$(printf ',%s' "${@:2}" | sed 's/^,$//')
recipe=$({ cat "$0"; echo "$packages"; } | sha256sum | cut -c1-16)
if [ "$(docker image inspect --format '{{.Config.Labels.recipe}}' "$name" 2>/dev/null)" = "$recipe" ]; then
  echo "base image $name: present"
  exit 0
fi

if ! command -v mmdebstrap >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "base image: mmdebstrap is missing; install it, or name a base image of your own" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null
fi

# The distribution's own archives, as apt knows them (third-party lists are left out).
. /etc/os-release
sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
  'Created-By: Packages' "Origin: ${ID^}" | sort -u)
if [ -z "$sources" ]; then
  apt-get update -qq
  sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' "Origin: ${ID^}" | sort -u)
fi

echo "base image $name: making it from ${ID^} $VERSION_CODENAME packages …"
# The archive's lists are left out of the image, and so is what only people read.
mmdebstrap --quiet --variant=essential --include="$packages" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
  --customize-hook='rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*' \
  --customize-hook='rm -f "$1"/etc/resolv.conf "$1"/etc/hostname' \
  "$VERSION_CODENAME" - - <<<"$sources" |
  docker import \
    --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'CMD ["python3"]' --change "LABEL recipe=$recipe" \
    --message "made by deploy/base-image.sh" - "$name" >/dev/null
echo "base image $name: $(docker image inspect --format '{{.Size}}' "$name" | numfmt --to=si)B"
