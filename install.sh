#!/usr/bin/env bash
# Makes the Python environment that the scripts run in; see usage below. Running it again is quick and harmless.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: bash install.sh [--active]

Installs requirements.txt into .venv beside this script, and graphviz's `dot` if it is missing and can be had.
Where there is no NVIDIA GPU, the smaller CPU build of torch is preferred; where its driver is older than 580, which
CUDA 13 needs, the build with CUDA 12.6.

  --active   install into the environment that is active (venv, conda, docker) instead of making one; torch 2.11 to
             2.13 stays as it is there
  -h, --help show this text

Environment variables:
  VENV=DIR       where to make the environment         (default: .venv beside this script)
  PYTHON=PROGRAM the Python to use, 3.11 or newer      (default: the first suitable of python3, python3.14 ... 3.11)
  ACTIVE=1       the same as --active
  TORCH=VERSION  another torch than that of requirements.txt: 2.11 to 2.13 are supported
USAGE
}

say() { printf '%s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
requirements=$here/requirements.txt
venv=${VENV:-$here/.venv}
active=${ACTIVE:-0}
supported_torch='2\.1[123]\.'  # 2.11 to 2.13: benchmarks/older_torch.sh tries the oldest
scripts="decode_plot, evaluate, evolve_dints, infer_dints, search_dints, train_dints"
export PIP_DISABLE_PIP_VERSION_CHECK=1

# Prints "3.11" for Python 3.11, nothing for a program that does not run: pyenv leaves such on the PATH.
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# Prints the Python to use. An environment is only active through its own names, so there no other is tried.
find_python() {
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11) candidate version seen=""
    if [[ $active == 1 ]]; then candidates=(python python3); fi
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$(python_version "$candidate")
        if [[ $version =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 11)); then
            say "$candidate"
            return
        fi
        if [[ -n $version ]]; then seen+=" $candidate is $version;"; fi
    done
    die "Python 3.11 or newer is needed, but${seen:- none of ${candidates[*]} runs;}" \
        "install one and name it: PYTHON=python3.11 bash install.sh"
}

# Sets `python` to the environment's, which is made where there is none.
use_venv() {
    local base
    python=$venv/bin/python
    if [[ -n $(python_version "$python") ]]; then return; fi
    if [[ -e $venv && -n $(ls -A "$venv") ]]; then
        die "$venv exists and holds no Python that runs: remove it, or name another folder with VENV=DIR"
    fi
    base=$(find_python)
    say "Making $venv with Python $(python_version "$base")"
    "$base" -m venv "$venv" ||
        die "$base cannot make it: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
}

# Sets `python` to that of the active environment.
use_active() {
    python=$(find_python)
    "$python" -c 'import os, sys, sysconfig
managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit(managed and sys.prefix == sys.base_prefix)' ||
        die "--active: $python belongs to the operating system: activate an environment first, or drop --active"
}

# What the environment was installed from: it changes when a second run has something to do.
fingerprint() {
    "$python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), *sys.version_info[:2], sys.argv[2])' \
        "$requirements" "$torch"
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }

# Prints the version of torch in the environment, with its build, as 2.13.0+cpu; nothing where there is none.
torch_there() {
    "$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

# Prints the version of torch that is to be there: TORCH, else the active environment's if it is supported, else ours.
wanted_torch() {
    local there=""
    if [[ -n ${TORCH:-} ]]; then
        [[ $TORCH =~ ^$supported_torch ]] || die "TORCH is $TORCH: 2.11 to 2.13 are supported, as in TORCH=2.11.0"
        say "$TORCH"
        return
    fi
    if [[ $active == 1 ]]; then there=$(torch_there); fi
    if [[ $there =~ ^$supported_torch ]]; then
        say "${there%%+*}"
    else
        sed -n 's/^torch==\([^ ;#]*\).*/\1/p' "$requirements"
    fi
}

# PyPI's torch for Linux is a CUDA 13 build of several GB: it would lie idle without a GPU or below driver 580.
choose_torch() {
    local build exact=$torch driver there why
    if ! has_nvidia_gpu; then
        build=cpu why="No NVIDIA GPU"
    else
        driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p) || driver=""
        if [[ ! $driver =~ ^([0-9]+)\. ]] || ((BASH_REMATCH[1] >= 580)); then return; fi
        build=cu126 exact+=+cu126 why="The NVIDIA driver is $driver, and torch's default build needs 580"
    fi
    there=$(torch_there)
    if [[ ${there%%+*} == "$torch" ]] && { [[ $build == cpu ]] || sees_gpu; }; then return; fi
    say "$why: installing torch==$exact from download.pytorch.org"
    "$python" -m pip install --no-deps --retries 1 --index-url "https://download.pytorch.org/whl/$build" \
        "torch==$exact" && return
    [[ $build == cpu ]] || die "it cannot be had: update the driver, or install a torch for it and use --active"
    warn "it cannot be had: the default package index's build of torch is installed instead"
}

sees_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

install_requirements() {
    # An environment made by uv, or whose making was interrupted, has none.
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
        die "$python has no pip: install it there first (conda: conda install pip)"
    if [[ $(uname -s) == Linux ]]; then choose_torch; fi
    sed "s/^torch==.*/torch==$torch/" "$requirements" >"$stamp.txt"
    if "$python" -m pip install -r "$stamp.txt"; then
        install_dot
    elif [[ $active == 1 ]] && (cd "$here" && "$python" -c "import $scripts") 2>/dev/null; then
        warn "pip could not install all of $requirements: the scripts run with what is there, in versions not tested"
    else
        die "pip could not install $requirements: see above; a second run continues where this one stopped"
    fi
    "$python" -c 'import torch
print(f"torch {torch.__version__}:", "CUDA is available" if torch.cuda.is_available() else "no CUDA, runs on the CPU")'
    if has_nvidia_gpu && ! sees_gpu; then
        warn "this torch cannot use the NVIDIA GPU: https://pytorch.org/get-started names the build for its driver"
    fi
}

# Drawing needs dot; without it the scripts still write the .gv source, so that failing here is no error.
install_dot() {
    local command apt=(apt-get) text
    if command -v dot >/dev/null; then return; fi
    if [[ -n ${CONDA_PREFIX:-} ]] && command -v conda >/dev/null; then
        command=(conda install --yes --quiet --channel conda-forge graphviz)
    elif [[ $(uname -s) == Darwin ]]; then
        command=(brew install graphviz)
    else
        if [[ $(id -u) != 0 ]]; then apt=(sudo -n apt-get); fi  # it must not stop to ask for a password
        command=("${apt[@]}" install --yes graphviz)
        run_quietly "${apt[@]}" update || true  # a fresh Docker image has no package lists
    fi
    text="${command[*]}"
    say "Installing graphviz's dot: $text"
    run_quietly "${command[@]}" ||
        warn "no graphviz program 'dot': architectures are written as .gv and not drawn until you run: ${text/ -n / }"
}

run_quietly() { DEBIAN_FRONTEND=noninteractive "$@" >/dev/null 2>&1 </dev/null; }

# Paths under the current folder are shown as the user would type them.
show_next() {
    say "Next:"
    if [[ $active != 1 ]]; then printf '    source %q\n' "${venv#"$PWD"/}/bin/activate"; fi
    local quickstart=$here/quickstart.sh
    printf '    bash %q\n' "${quickstart#"$PWD"/}"
}

main() {
    while (($#)); do
        case $1 in
        --active) active=1 ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die "unknown argument $1: see bash install.sh --help" ;;
        esac
        shift
    done
    [[ -f $requirements ]] || die "$requirements does not exist: run install.sh from a whole checkout"

    local python stamp torch
    if [[ $active == 1 ]]; then use_active; else use_venv; fi
    torch=$(wanted_torch)
    stamp=$("$python" -c 'import sys; print(sys.prefix)')/.dints-installed
    if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
        say "The environment is up to date: ${stamp%/*}"
    else
        install_requirements
        fingerprint >"$stamp"
    fi
    show_next
}

main "$@"
