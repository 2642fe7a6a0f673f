#!/usr/bin/env bash
# What the Docker tests need, for a person and for CI. Each step is skipped when its result is there.
#
#   tests/docker/setup.sh         a Docker Engine, the base image, two local registries
#   tests/docker/setup.sh env     only prints the variables that the tests read
#   tests/docker/setup.sh stop    ends what this script started, and nothing else
#
# Where a Docker Engine answers, that one is used. Otherwise Debian's is installed and started (needs root).
set -euo pipefail
cd "$(dirname "$0")/../.."

state=${ENGINE_TEST_STATE:-${XDG_RUNTIME_DIR:-/tmp}/engine-orchestrator-docker-$(id -u)}
base=${ENGINE_TEST_BASE:-engine-orchestrator-base:dev}
open_port=${ENGINE_TEST_REGISTRY_PORT:-5000}
locked_port=${ENGINE_TEST_LOCKED_REGISTRY_PORT:-5001}
user=tester
password=only-for-the-tests

say() { echo "docker tests: $*"; }
die() { say "$*" >&2; exit 1; }

print_env() {
  echo "ENGINE_TEST_BASE=$base"
  echo "ENGINE_TEST_REGISTRY=127.0.0.1:$open_port"
  echo "ENGINE_TEST_LOCKED_REGISTRY=127.0.0.1:$locked_port"
  echo "ENGINE_TEST_REGISTRY_USER=$user"
  echo "ENGINE_TEST_REGISTRY_PASSWORD=$password"
}

# A process is ours when its start time is the one we wrote down.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
remember() { echo "$2 $(started_at "$2")" >"$state/$1.pid"; }
is_ours() {
  local pid when
  [ -e "$state/$1.pid" ] || return 1
  read -r pid when <"$state/$1.pid"
  [ -n "$when" ] && [ "$(started_at "$pid")" = "$when" ]
}
end() {
  local pid
  if is_ours "$1"; then
    read -r pid _ <"$state/$1.pid"
    kill -TERM "$pid"
    for _ in $(seq 300); do is_ours "$1" || break; sleep 0.1; done
    is_ours "$1" && kill -KILL "$pid"
    say "$1 stopped"
  fi
  rm -f "$state/$1.pid"
}
detach() { # name, command …: runs on after this script, with a log of its own
  local name=$1
  shift
  setsid nohup "$@" >>"$state/$name.log" 2>&1 </dev/null &
  remember "$name" $!
}
await() { # name, seconds, command …
  local name=$1 tries=$(($2 * 10))
  shift 2
  for _ in $(seq "$tries"); do
    "$@" >/dev/null 2>&1 && return 0
    is_ours "$name" || break
    sleep 0.1
  done
  tail -n 20 "$state/$name.log" >&2
  die "$name did not come up; its log is $state/$name.log"
}
apt_install() {
  command -v apt-get >/dev/null || die "$* missing, and there is no apt-get"
  [ "$(id -u)" = 0 ] || die "$* missing; install them, or run this as root"
  [ -e "$state/apt-updated" ] || apt-get update -qq
  touch "$state/apt-updated"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
daemon_answers() { timeout 20 docker version --format '{{.Server.Version}}'; }

start_daemon() {
  if command -v docker >/dev/null && daemon_answers >/dev/null 2>&1; then return; fi
  [ -z "${DOCKER_HOST:-}" ] || die "no Docker Engine answers at DOCKER_HOST"
  command -v dockerd >/dev/null || apt_install docker.io iptables
  detach dockerd dockerd
  await dockerd 60 daemon_answers
}

registry_answers() { # 401 is an answer as well
  python3 - "$1" <<'PY'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/v2/", timeout=5)
except urllib.error.HTTPError as error:
    sys.exit(error.code != 401)
PY
}

start_registry() { # name, port, extra configuration
  local name=$1 port=$2
  if is_ours "$name"; then return; fi
  if registry_answers "$port" >/dev/null 2>&1; then die "port $port is in use; set another one (see the top of $0)"; fi
  # Unpacked, not installed: the package would start a service of its own.
  if [ ! -x "$state/usr/bin/docker-registry" ]; then
    [ -e "$state/apt-updated" ] || apt-get update -qq
    (cd "$state" && apt-get download -qq -o APT::Sandbox::User=root docker-registry >/dev/null && dpkg-deb -x docker-registry_*.deb . &&
      rm docker-registry_*.deb)
  fi
  {
    echo 'version: 0.1'
    echo 'log: {level: warn, accesslog: {disabled: true}}'
    echo "storage: {filesystem: {rootdirectory: $state/$name}, delete: {enabled: true}}"
    echo "http: {addr: '127.0.0.1:$port'}"
    echo "$3"
  } >"$state/$name.yml"
  # Its tracing would look for a collector.
  detach "$name" env OTEL_TRACES_EXPORTER=none "$state/usr/bin/docker-registry" serve "$state/$name.yml"
  await "$name" 30 registry_answers "$port"
}

case ${1:-start} in
  env) print_env ;;
  start)
    mkdir -p -m 700 "$state"
    [ -O "$state" ] || die "$state belongs to somebody else"
    start_daemon
    deploy/base-image.sh "$base"
    command -v htpasswd >/dev/null || apt_install apache2-utils
    htpasswd -Bbn "$user" "$password" >"$state/htpasswd"
    # RUNLEVEL: Debian's packages then start no service of their own.
    [ -x /usr/sbin/sshd ] || [ "$(id -u)" != 0 ] || RUNLEVEL=1 apt_install openssh-server openssh-client
    command -v openssl >/dev/null || apt_install openssl
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null || apt_install docker-compose
    # Not Docker's: with it the tests of the engine's sandbox run on the host, too.
    command -v bwrap >/dev/null || [ "$(id -u)" != 0 ] || apt_install bubblewrap
    start_registry registry "$open_port" ''
    start_registry locked-registry "$locked_port" "auth: {htpasswd: {realm: tests, path: $state/htpasswd}}"
    say "ready, Docker Engine $(daemon_answers)"
    ;;
  stop)
    end registry
    end locked-registry
    end dockerd
    rm -f "$state/apt-updated"
    ;;
  *) die "unknown mode '$1'" ;;
esac
