#!/usr/bin/env bash
# What the tests of deploy/ need: promtool (Debian's prometheus) and systemd-analyze. Needs root where one is missing.
# The packages are unpacked or installed without starting a service.
set -euo pipefail

missing=()
command -v promtool >/dev/null || missing+=(prometheus)
command -v systemd-analyze >/dev/null || missing+=(systemd)
if [ ${#missing[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "tools: ${missing[*]} missing; install them, or run this as root on Debian" >&2
    exit 1
  fi
  apt-get update -qq
  # RUNLEVEL: Debian's packages then start no service of their own.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
echo "tools: $(promtool --version 2>&1 | head -1), $(systemd-analyze --version | head -1)"
