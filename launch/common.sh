# shellcheck shell=bash
# What the scripts of this folder share; they source it.

DRY_RUN=""

# fail LINE: one line on stderr, and the exit status of a mistake in the command.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# usage FILE: prints the comment that a script begins with.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"; }

# quoted WORD...: the words, each so that a shell reads it back.
quoted() {
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run WORD...: runs a command; with --dry-run prints it.
run() {
  if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# whole NAME VALUE: fails unless VALUE is a whole number above 0.
whole() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: write a whole number above 0"; }

# given NAME VALUE: fails where a flag that has no default is missing.
given() { [[ $2 ]] || fail "$1=... is missing; see --help"; }

# pair NAME VALUE: fails unless VALUE is VARIABLE=TEXT.
pair() { [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$1=$2: write $1=VARIABLE=VALUE"; }

# flags SCRIPT "FLAG..." WORD...: reads the words of a command line into variables of the flags' names,
# and what is behind "--" into the array `command`. A FLAG "name" takes a value; "name?" takes none and
# becomes 1; "name+" may be repeated and is an array. All have --env, into the array `environment`,
# --dry-run and --help, which prints the script's usage and exits.
flags() {
  local script=$1 known=" $2 env+ " flag
  shift 2
  command=()
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    case $1 in
      --env=*) pair --env "${1#*=}"; environment+=("${1#*=}") ;;
      --dry-run) DRY_RUN=1 ;;
      --help) usage "$script"; exit ;;
      --)
        shift
        # shellcheck disable=SC2034  # the scripts read it
        command=("$@")
        return
        ;;
      --[a-z]*=*)
        # The names are this folder's own, so that nothing but them is evaluated.
        if [[ $known == *" $flag "* ]]; then printf -v "$flag" %s "${1#*=}"
        elif [[ $known == *" $flag+ "* ]]; then eval "$flag+=(\"\${1#*=}\")"
        else fail "unknown flag '$1'; see $script --help"
        fi
        ;;
      *)
        if [[ $1 != -* ]]; then fail "'$1' is not a flag; write the command after --"
        elif [[ $1 == "--$flag" && $known == *" $flag? "* ]]; then printf -v "$flag" %s 1
        elif [[ $1 == "--$flag" && $known =~ " $flag"\+?" " ]]; then fail "$1: write $1=VALUE"
        else fail "unknown flag '$1'; see $script --help"
        fi
        ;;
    esac
    shift
  done
}

# found PROGRAM: fails where it is not installed.
found() { [[ $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$1 is not installed, or not on PATH"; }
