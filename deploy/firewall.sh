#!/usr/bin/env bash
# Cuts what Docker cannot: engines reach neither the services of their host nor link-local addresses (the metadata
# service of a cloud), nor what you name. They still reach the internet and answer on their published ports.
#
#   deploy/firewall.sh [--deny ADDRESS[/BITS]]…   as often as you like; the last call counts
#   deploy/firewall.sh --check                    exit code 0 when the rules are in force
#   deploy/firewall.sh --undo                     as if it had never run
#
# Run it as root on the host of the Docker Engine, after each start of the host. It covers every network that the
# orchestrator makes, also later ones; for one that you made yourself name its bridge: ENGINE_BRIDGES="br-… br-…".
set -euo pipefail

bridges=(oeng-+ ${ENGINE_BRIDGES:-})
to_host=ENGINE-TO-HOST
to_others=ENGINE-TO-OTHERS

undo() { # iptables or ip6tables
  local hook chain
  for hook in "INPUT $to_host" "DOCKER-USER $to_others" "FORWARD $to_others"; do
    chain=${hook#* }
    # Every jump, whatever bridge it is for.
    { "$1" -w -S "${hook% *}" 2>/dev/null || true; } | { grep -- "-j $chain\$" || true; } | sed 's/^-A/-D/' |
      while read -r rule; do "$1" -w $rule; done
  done
  for chain in "$to_host" "$to_others"; do
    "$1" -w -F "$chain" 2>/dev/null && "$1" -w -X "$chain" || true
  done
}

apply() { # iptables or ip6tables, link-local network, denied addresses …
  local tables=$1 link_local=$2 forward=FORWARD address bridge
  shift 2
  undo "$tables"
  # Docker keeps this chain before its own rules; without Docker's rules the plain one does.
  "$tables" -w -S DOCKER-USER >/dev/null 2>&1 && forward=DOCKER-USER
  "$tables" -w -N "$to_host"
  "$tables" -w -A "$to_host" -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN
  # A resolver that runs on the host itself.
  "$tables" -w -A "$to_host" -p udp --dport 53 -j RETURN
  "$tables" -w -A "$to_host" -p tcp --dport 53 -j RETURN
  "$tables" -w -A "$to_host" -j DROP
  "$tables" -w -N "$to_others"
  "$tables" -w -A "$to_others" -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN
  for address in "$link_local" "$@"; do
    "$tables" -w -A "$to_others" -d "$address" -j DROP
  done
  # The jumps come last: what they lead to is complete.
  for bridge in "${bridges[@]}"; do
    "$tables" -w -I INPUT 1 -i "$bridge" -j "$to_host"
    "$tables" -w -I "$forward" 1 -i "$bridge" -j "$to_others"
  done
}

check() {
  local bridge
  for bridge in "${bridges[@]}"; do
    iptables -w -C INPUT -i "$bridge" -j "$to_host" 2>/dev/null &&
      { iptables -w -C DOCKER-USER -i "$bridge" -j "$to_others" 2>/dev/null ||
        iptables -w -C FORWARD -i "$bridge" -j "$to_others" 2>/dev/null; } || return 1
  done
}

mode=apply
denied4=()
denied6=()
while [ $# -gt 0 ]; do
  case $1 in
    --undo) mode=undo ;;
    --check) mode=check ;;
    --deny)
      [ $# -gt 1 ] || { echo "--deny needs an address" >&2; exit 2; }
      case $2 in *:*) denied6+=("$2") ;; *) denied4+=("$2") ;; esac
      shift
      ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done

command -v iptables >/dev/null || { echo "firewall: the command iptables is missing" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "firewall: must run as root" >&2; exit 1; }
case $mode in
  check) check ;;
  undo)
    undo iptables
    if ip6tables -w -S >/dev/null 2>&1; then undo ip6tables; fi
    ;;
  apply)
    apply iptables 169.254.0.0/16 "${denied4[@]}"
    if ip6tables -w -S >/dev/null 2>&1; then apply ip6tables fe80::/10 "${denied6[@]}"; fi
    ;;
esac
