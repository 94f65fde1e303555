#!/usr/bin/env bash
# What launch/tpu.sh does on each machine of a slice; it lies there with the rest of the code.
#
#   worker.sh install           a Python environment with t2i_jax, beside the code
#   worker.sh start COMMAND...  runs it in the background; its output goes to the log
#   worker.sh status            none, running, lost, or "ended STATUS"
#   worker.sh stop              asks the command to save and stop
#   worker.sh log [LINES]       the log, or its end
#
# All lies in $T2I_HOME (~/t2i): code, venv, log, pid, status.
set -euo pipefail
code=$(cd "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$code/launch/common.sh"
home=${T2I_HOME:-$HOME/t2i}

alive() {
  [[ ! -f $home/status && -f $home/pid ]] && kill -0 "$(<"$home/pid")" 2>/dev/null
}

# A new Python environment. The machines' own Python may be older than t2i_jax needs; uv brings one.
environment() {
  local python
  for python in python3.13 python3.12 python3.11; do
    rm -rf "$home/venv"  # of an attempt that broke off: uv takes no folder that is there
    command -v "$python" >/dev/null && "$python" -m venv "$home/venv" && return
  done
  rm -rf "$home/venv"
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python=3.12 "$home/venv"
}

install() {
  if ! "$home/venv/bin/pip" --version >/dev/null 2>&1; then environment; fi
  "$home/venv/bin/pip" install --quiet -e "${code}[tpu,gcs]"
  "$home/venv/bin/python" -c 'import t2i_jax; print("installed", t2i_jax.__version__)'
}

# Runs in a session of its own, and so outlives the connection that started it.
inside() {
  local child status=0
  cd "$code"
  # shellcheck source=/dev/null
  if [[ -f $home/venv/bin/activate ]]; then . "$home/venv/bin/activate"; fi
  env T2I_EXIT_STOPPED=75 "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  while kill -0 "$child" 2>/dev/null; do sleep 1; done
  wait "$child" || status=$?
  echo "$status" >"$home/status.writing"
  mv "$home/status.writing" "$home/status"
}

case ${1:-} in
  install) mkdir -p "$home"; install ;;
  start)
    shift
    (($#)) || fail "no command; write worker.sh start COMMAND..."
    mkdir -p "$home"
    if alive; then fail "a run is under way on $(hostname); stop it first"; fi
    rm -f "$home/status"
    printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$(quoted "$@")" >>"$home/log"
    setsid "${BASH_SOURCE[0]}" inside "$@" >>"$home/log" 2>&1 </dev/null &
    echo "$!" >"$home/pid"
    ;;
  inside) shift; inside "$@" ;;
  status)
    if [[ -f $home/status ]]; then echo "ended $(<"$home/status")"
    elif alive; then echo running
    elif [[ -f $home/pid ]]; then echo lost
    else echo none
    fi
    ;;
  stop) if alive; then kill -TERM "$(<"$home/pid")"; fi ;;
  log) if [[ ${2:-} ]]; then tail -n "$2" "$home/log"; else cat "$home/log"; fi ;;
  --help) usage "$0" ;;
  *) fail "unknown command '${1:-}'; see worker.sh --help" ;;
esac
