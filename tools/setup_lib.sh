# Shared by ./quickstart and ./test (sourced by bash): numbered steps with a log each, system packages, the project's
# .venv, and builds. Callers set `root`, `steps_total` and `log_prefix` before the first step.

export root log_prefix  # each step runs in a shell of its own
log_dir="$root/build/logs"
# Objects in the compiler cache serve every checkout on this machine, whatever its path.
export CCACHE_BASEDIR="$root" CCACHE_NOHASHDIR=1

# Boost of at least 1.81: Debian 12's own is older, and has 1.81 beside it.
boost_package=libboost-dev
if grep -qsx 'VERSION_CODENAME=bookworm' /etc/os-release; then boost_package=libboost1.81-dev; fi

build_packages=(
  g++ cmake ninja-build ccache pkg-config python3-venv
  libfmt-dev libcli11-dev nlohmann-json3-dev libpcre2-dev libicu-dev libssl-dev libhwy-dev
  "$boost_package" libspdlog-dev libsimdjson-dev libtomlplusplus-dev
  libgtest-dev libgmock-dev libbenchmark-dev
)
# clang with its runtime is for libFuzzer.
test_packages=(clang libclang-rt-dev git)

die() {
  printf '\n%s: %s\n' "$log_prefix" "$1" >&2
  shift
  (($# == 0)) || printf '  %s\n' "$@" >&2
  exit 1
}

# --- Steps -----------------------------------------------------------------------------------------------------------

step_index=0

# Says every half minute (on a terminal: every second, in place) how long a step has taken and its log's last line.
show_progress() {
  local title=$1 log=$2 parent=$3 started=$SECONDS next=30 last
  while sleep 1 && kill -0 "$parent" 2>/dev/null; do
    last=$(tail -c 2000 "$log" 2>/dev/null | tr '\r' '\n' | tail -n 1 | tr -cd '[:print:]')
    if [[ -t 1 ]]; then
      printf '\r\033[K%s ... %d s  %s' "$title" $((SECONDS - started)) "${last:0:60}"
    elif ((SECONDS - started >= next)); then
      printf '      %d s: %s\n' $((SECONDS - started)) "${last:0:120}"
      next=$((next + 30))
    fi
  done
}

# try_step <title> <function of this file> [arguments]: runs the function, its output going to a log of its own, and returns
# its exit status. step_log, step_title and step_seconds are left for the caller. The function runs in a shell of its own,
# where `set -e` holds whatever condition try_step itself stands in.
try_step() {
  local name=$1 rc=0 started=$SECONDS ticker
  shift
  step_index=$((step_index + 1))
  step_title="[$step_index/$steps_total] $name"
  mkdir -p "$log_dir"
  step_log="$log_dir/$log_prefix-$(printf '%02d' "$step_index").log"
  : >"$step_log"
  if [[ -t 1 ]]; then printf '%s ...' "$step_title"; else printf '%s ...\n' "$step_title"; fi
  show_progress "$step_title" "$step_log" $$ &
  ticker=$!
  bash -euo pipefail -c '. "$root/tools/setup_lib.sh"; "$@"' "$log_prefix" "$@" >"$step_log" 2>&1 </dev/null || rc=$?
  { kill "$ticker" && wait "$ticker"; } 2>/dev/null || true
  step_seconds=$((SECONDS - started))
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
  return "$rc"
}

# report_failure <advice>...: the log's end and what to do about it.
report_failure() {
  printf '%s: FAILED after %d s. The end of %s:\n\n' "$step_title" "$step_seconds" "${step_log#"$root"/}"
  tail -n 40 "$step_log" | sed 's/^/    /'
  printf '\n'
  printf '  What to do: %s\n' "$1"
  shift
  [[ $# -eq 0 ]] || printf '              %s\n' "$@"
}

# step <title> <advice on failure> <function> [arguments]: ends the script when the function fails.
step() {
  local title=$1 advice=$2
  shift 2
  if ! try_step "$title" "$@"; then
    report_failure "$advice" "Running $log_prefix again goes on from here." >&2
    exit 1
  fi
  printf '%s: %s%d s\n' "$step_title" "$(note_of_step)" "$step_seconds"
}

# A step's function says in one line what it did by writing it to the log as "note: ...".
note_of_step() {
  sed -n 's/^note: \(.*\)$/\1, /p' "$step_log" | tail -n 1
}

# --- The machine -----------------------------------------------------------------------------------------------------

# The first step: its messages need no log.
machine_step() {
  local found
  found=$(check_machine)
  step_index=1
  printf '[1/%d] The machine: %s\n' "$steps_total" "$found"
}

check_machine() {
  local id='' version='' name='' like='' disk
  [[ $(uname -sm) == 'Linux x86_64' ]] ||
    die "this machine is $(uname -sm); only 64-bit x86 Linux is supported"
  [[ -r /proc/cpuinfo ]] || die '/proc/cpuinfo cannot be read, so the processor is unknown' 'In a chroot, mount /proc.'
  local flag
  for flag in avx2 fma; do
    grep -qm1 "^flags.*[[:space:]]$flag\([[:space:]]\|\$\)" /proc/cpuinfo ||
      die "the processor lacks ${flag^^}, which every kernel and libtorch need" \
        'Any Intel processor since Haswell (2013) or AMD since Excavator (2015) has it; in a virtual machine, pass the host CPU through.'
  done
  if [[ -r /etc/os-release ]]; then
    id=$(. /etc/os-release && printf '%s' "${ID:-}")
    version=$(. /etc/os-release && printf '%s' "${VERSION_ID:-}")
    name=$(. /etc/os-release && printf '%s' "${PRETTY_NAME:-}")
    like=$(. /etc/os-release && printf '%s' "${ID_LIKE:-}")
  fi
  command -v apt-get >/dev/null ||
    die "${name:-this system} has no apt: Debian 12 and Ubuntu 24.04 are supported"
  case "$id" in
    debian) ((${version%%.*:-0} >= 12)) 2>/dev/null || [[ -z $version ]] ||
      die "$name is too old: Debian 12 or Ubuntu 24.04 is needed (for g++ 12 and Highway 1.0)" ;;
    ubuntu) ((${version%%.*} >= 24)) 2>/dev/null ||
      die "$name is too old: Debian 12 or Ubuntu 24.04 is needed (for g++ 12 and Highway 1.0)" ;;
    *) ;;
  esac
  case "$id:$version" in
    debian:12 | ubuntu:24.04) echo "$name, $(nproc) cores" ;;
    *) echo "${name:-unknown system}${like:+ (like $like)}, not tested (Debian 12 and Ubuntu 24.04 are), $(nproc) cores" ;;
  esac
  disk=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
  [[ -x $root/.venv/bin/python ]] || ((disk >= 5)) ||
    die "only $disk GiB are free for $root; about 5 are needed"
}

# --- System packages -------------------------------------------------------------------------------------------------

missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || printf '%s\n' "$package"
  done
}

# Before a step hides the terminal: gets sudo's password if one is needed.
authorize_install() {
  [[ -n $(missing_packages "$@") && $(id -u) -ne 0 ]] || return 0
  command -v sudo >/dev/null ||
    die 'system packages are missing, and this is neither root nor is sudo there' \
      "As root: apt-get update && apt-get install --no-install-recommends $(missing_packages "$@" | tr '\n' ' ')"
  if [[ -t 0 ]]; then sudo -v; else sudo -n -v; fi ||
    die 'sudo was refused, and system packages are missing' \
      "As root: apt-get update && apt-get install --no-install-recommends $(missing_packages "$@" | tr '\n' ' ')"
}

install_packages() {
  local missing as_root=(env)
  mapfile -t missing < <(missing_packages "$@")
  if ((${#missing[@]} == 0)); then
    echo "note: all $# are there"
    return
  fi
  [[ $(id -u) -eq 0 ]] || as_root=(sudo -n env)
  as_root+=(DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true NEEDRESTART_MODE=a LC_ALL=C.UTF-8)
  local apt=("${as_root[@]}" apt-get -y -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0)
  # Finishes what an earlier run that was cut off left half-configured; otherwise these two do nothing.
  "${as_root[@]}" dpkg --configure -a
  "${apt[@]}" --fix-broken --no-install-recommends install
  "${apt[@]}" update
  "${apt[@]}" --no-install-recommends install "${missing[@]}"
  echo "note: installed ${#missing[@]} and what they need"
}

# --- Python packages -------------------------------------------------------------------------------------------------

# install_requirements <file>...: makes or repairs .venv, and installs each file whose content is not what was installed.
# The stamps are written last and a marker stands while pip runs, so a .venv that was cut off half-way is made anew.
install_requirements() {
  local venv="$root/.venv" file stamp want todo=()
  if [[ -e $venv/.installing ]] || { [[ -e $venv ]] && ! "$venv/bin/python" -c '' 2>/dev/null; }; then
    echo 'The .venv is incomplete: making it anew'
    rm -rf "$venv"
  fi
  for file in "$@"; do
    stamp="$venv/.installed-$file"
    want=$(sha256sum <"$root/$file")
    [[ -e $stamp && $(<"$stamp") == "$want" ]] || todo+=("$file")
  done
  if ((${#todo[@]} == 0)); then
    echo 'note: up to date'
    return
  fi
  # The distribution's own Python: the one that the package python3-venv belongs to.
  local made=true
  [[ -e $venv ]] || made=false
  mkdir -p "$venv"
  : >"$venv/.installing"
  $made || /usr/bin/python3 -m venv "$venv"
  for file in "${todo[@]}"; do
    PYTHONNOUSERSITE=1 "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --no-deps \
      --only-binary=:all: --progress-bar=off --retries=5 -r "$root/$file"
  done
  for file in "${todo[@]}"; do sha256sum <"$root/$file" >"$venv/.installed-$file"; done
  rm "$venv/.installing"
  echo "note: installed ${todo[*]}"
}

# What the CUDA part needs, if the build will find a CUDA toolkit that is new enough (in step with cmake/Cuda.cmake).
cuda_requirements() {
  local nvcc version
  for nvcc in "${CUDA_HOME:-}/bin/nvcc" "${CUDA_PATH:-}/bin/nvcc" /usr/local/cuda/bin/nvcc "$(command -v nvcc)"; do
    [[ -x $nvcc ]] || continue
    version=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
    [[ $(printf '%s\n' 12.8 "$version" | sort -V | head -n 1) != 12.8 ]] || echo requirements-cuda.txt
    return 0
  done
}

# --- Builds ----------------------------------------------------------------------------------------------------------

# A translation unit that includes libtorch takes up to 2.5 GiB.
build_jobs() {
  local cores by_memory
  cores=$(nproc)
  by_memory=$(awk '/^MemAvailable:/ { print int($2 / (2.5 * 1048576)) }' /proc/meminfo)
  ((by_memory >= 1)) || by_memory=1
  echo $((by_memory < cores ? by_memory : cores))
}

configure() {
  local preset=$1 cache="$root/build/$1/CMakeCache.txt"
  shift
  if [[ -e $cache ]] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$cache"; then
    echo "build/$preset was configured for another place: starting it anew"
    rm -rf "$root/build/$preset"
  fi
  cd "$root" || return
  cmake --preset "$preset" "$@"
}

# build <preset> <target>...
build() {
  local preset=$1
  shift
  configure "$preset"
  NINJA_STATUS='[%f/%t] ' ninja -C "$root/build/$preset" -j "$(build_jobs)" "$@"
}

# run_ctest <preset> <jobs> [ctest arguments]
run_ctest() {
  local preset=$1 jobs=$2 wrap=()
  shift 2
  # ThreadSanitizer's address layout does not hold under the wide address randomisation of newer kernels.
  if [[ $preset == tsan ]] && setarch -R true; then wrap=(setarch -R); fi
  "${wrap[@]}" ctest --test-dir "$root/build/$preset" -j "$jobs" --output-on-failure --no-tests=ignore "$@"
}
