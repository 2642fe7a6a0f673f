#!/usr/bin/env bash
# What the browser tests need: the distribution's Chromium (needs root where it is missing).
set -euo pipefail

if command -v chromium >/dev/null; then
  echo "browser tests: $(chromium --version --no-sandbox 2>/dev/null)"
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "browser tests: chromium is missing; install it, or run this as root on Debian" >&2
  exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
echo "browser tests: $(chromium --version --no-sandbox 2>/dev/null)"
