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
torch_indexes=https://download.pytorch.org/whl
supported_torch='2\.1[123]\.'  # 2.11 to 2.13: benchmarks/older_torch.sh tries the oldest
offline=0
export PIP_DISABLE_PIP_VERSION_CHECK=1

# Prints "3.11" for Python 3.11, nothing for a program that does not run: pyenv leaves such on the PATH.
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# NumPy, SciPy and matplotlib, as pinned, need 3.11.
new_enough() { [[ $1 =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 11)); }

# Prints the Python to use. An environment is only active through its own names, so there no other is tried.
find_python() {
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11) candidate version seen=""
    if [[ $active == 1 ]]; then candidates=(python python3); fi
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$(python_version "$candidate")
        if new_enough "$version"; then
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
    local wanted version remedy="remove it, or name another folder with VENV=DIR"
    python=$venv/bin/python
    version=$(python_version "$python")
    if [[ -n $version ]]; then
        new_enough "$version" || die "$venv holds Python $version, 3.11 or newer is needed: $remedy"
        if [[ -n ${PYTHON:-} && $(python_version "$PYTHON") != "$version" ]]; then
            die "$venv holds Python $version, but PYTHON=$PYTHON is another: $remedy"
        fi
        return
    fi
    if [[ -e $venv/pyvenv.cfg ]]; then
        die "$venv is an environment whose Python does not run: $remedy"
    elif [[ -e $venv && -n $(ls -A "$venv") ]]; then
        die "$venv exists and is not a Python environment: name another folder with VENV=DIR"
    fi
    wanted=$(find_python)
    version=$(python_version "$wanted")
    "$wanted" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$wanted has no venv module: install it first (Debian, Ubuntu: apt-get install python$version-venv)"
    say "Making $venv with Python $version"
    "$wanted" -m venv "$venv" || die "$wanted -m venv $venv failed: see above"
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

# install_torch BUILD WHY: that build of `torch`'s version, unless there is one that serves.
install_torch() {
    local build=$1 why=$2 index=$torch_indexes/$1 there exact=$torch
    there=$(torch_there)
    if [[ $build != cpu ]]; then exact+=+$build; fi
    if [[ ${there%%+*} == "$torch" ]] && { [[ $build == cpu ]] || sees_gpu; }; then
        say "$why: keeping the torch $there that is already there"
    elif "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$index/torch/" 2>/dev/null; then
        say "$why: installing torch==$exact from $index"
        "$python" -m pip install --no-deps --index-url "$index" "torch==$exact" && return
        [[ $build == cpu ]] || die "pip could not install it: see above"
        warn "that failed: the default package index's build of torch is installed instead"
    elif [[ $build == cpu ]]; then
        say "$why, but $index cannot be reached: installing the default package index's build of torch==$torch"
    else
        die "$why, but its build for older drivers cannot be had, for $index cannot be reached:" \
            "update the driver, or install torch 2.11 to 2.13 for it yourself, and run install.sh --active there"
    fi
}

# PyPI's torch for Linux is a CUDA 13 build of several GB: it would lie idle without a GPU or below driver 580.
choose_torch() {
    local version
    if ! has_nvidia_gpu; then
        install_torch cpu "No NVIDIA GPU"
        return
    fi
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || version=""
    if [[ $version =~ ^([0-9]+)\.[0-9.]+ ]] && ((BASH_REMATCH[1] < 580)); then
        install_torch cu126 "The NVIDIA driver is ${BASH_REMATCH[0]}, and torch's default build needs 580"
    fi
}

sees_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# Prints what running needs of requirements.txt, all but its last parts, and the environment has in no version.
lacking() {
    "$python" -c 'import sys
from importlib.metadata import PackageNotFoundError, version
for line in open(sys.argv[1]).read().split("# For tests")[0].splitlines():
    name = line.split("==")[0]
    if name and not name.startswith("#"):
        try:
            version(name)
        except PackageNotFoundError:
            print(name)' "$requirements"
}

# What of it cannot be had is no matter in an active environment that can run everything.
pip_install() {
    local file=$requirements
    if [[ $(<"$requirements") != *"torch==$torch"* ]]; then
        file=${stamp%/*}/.dints-requirements.txt
        sed "s/^torch==.*/torch==$torch/" "$requirements" >"$file"
    fi
    "$python" -m pip install -r "$file" && return
    if [[ $active == 1 && -z $(lacking) && $(torch_there) =~ ^$supported_torch ]]; then
        warn "pip could not install all of $requirements: what is there is used, in versions that may not be tested"
        offline=1
        return
    fi
    die "pip could not install $requirements: see above; a second run continues where this one stopped"
}

install_requirements() {
    # An environment made by uv, or whose making was interrupted, has none.
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
        die "$python has no pip: install it there first (conda: conda install pip)"
    if [[ $(uname -s) == Linux ]]; then choose_torch; fi
    pip_install
    "$python" -c 'import torch
print(f"torch {torch.__version__}:", "CUDA is available" if torch.cuda.is_available() else "no CUDA, runs on the CPU")'
    if has_nvidia_gpu && ! sees_gpu; then
        warn "this torch cannot use the NVIDIA GPU: https://pytorch.org/get-started names the build for its driver"
    fi
}

dot_command() {
    if [[ -n ${CONDA_PREFIX:-} ]] && command -v conda >/dev/null; then
        say "conda install --yes --quiet --channel conda-forge graphviz"
    elif [[ $(uname -s) == Darwin ]]; then
        say "brew install graphviz"
    elif [[ $(id -u) == 0 ]]; then
        say "apt-get install --yes graphviz"
    else
        say "sudo apt-get install --yes graphviz"
    fi
}

# Drawing needs dot; without it the scripts still write the .gv source, so that failing here is no error.
install_dot() {
    local command
    if command -v dot >/dev/null; then return; fi
    command=$(dot_command)
    # sudo must not stop to ask for a password.
    if [[ $offline == 0 ]] && command -v "${command%% *}" >/dev/null && { [[ $command != sudo* ]] || sudo -n true 2>/dev/null; }; then
        say "Installing graphviz's dot: $command"
        if run_quietly "$command"; then return; fi
        if [[ $command == *apt-get* ]]; then
            # A fresh Docker image has no package lists.
            if run_quietly "${command%%install*}update" && run_quietly "$command"; then return; fi
        fi
    fi
    warn "no graphviz program 'dot': architectures are written as .gv and not drawn until you run: $command"
}

# The command is one of dot_command's, whose words hold no blanks.
run_quietly() {
    local words
    read -ra words <<<"$1"
    DEBIAN_FRONTEND=noninteractive "${words[@]}" >/dev/null </dev/null
}

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
        install_dot
        fingerprint >"$stamp"
    fi
    show_next
}

main "$@"
