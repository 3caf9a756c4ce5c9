#!/usr/bin/env bash
# Checks that the C++ sources are as clang-format 14 writes them; --fix rewrites those that are not.
# Usage: tools/check_format.sh [--fix] [--root FOLDER]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tools_root=$root
fix=false
while (($#)); do
  case "$1" in
    --fix) fix=true ;;
    --root)
      root=$2
      shift
      ;;
    *)
      echo "check_format: unknown argument '$1'" >&2
      exit 2
      ;;
  esac
  shift
done

# Other versions format some constructs in another way, so only 14 will do; ./test installs it into .venv.
format=''
for candidate in "$tools_root/.venv/bin/clang-format" clang-format-14 clang-format; do
  if "$candidate" --version 2>/dev/null | grep -q 'version 14\.'; then
    format=$candidate
    break
  fi
done
if [[ -z $format ]]; then
  echo 'check_format: clang-format 14 is not there: run ./test once, which installs it into .venv' >&2
  exit 2
fi

cd "$root"
folders=()
for folder in src tests bench; do [[ ! -d $folder ]] || folders+=("$folder"); done
mapfile -d '' files < <(find "${folders[@]}" -type f \
  \( -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \) -print0 | sort -z)
if ((${#files[@]} == 0)); then
  echo 'check_format: no sources found' >&2
  exit 2
fi
if $fix; then
  "$format" -i "${files[@]}"
else
  rc=0
  found=$("$format" --dry-run --Werror "${files[@]}" 2>&1) || rc=$?
  mapfile -t bad < <(sed -nE 's/^([^:]+):[0-9]+:[0-9]+: error: code should be .*/\1/p' <<<"$found" | sort -u)
  if ((rc != 0 && ${#bad[@]} == 0)); then
    echo "check_format: $format failed: $found" >&2
    exit 2
  fi
  for file in "${bad[@]}"; do
    echo "$file: not formatted (tools/check_format.sh --fix)"
    "$format" "$file" | diff -u "$file" - | sed -n '3,12p' || true
  done
  echo "check_format: ${#files[@]} files, ${#bad[@]} errors"
  ((${#bad[@]} == 0))
fi
