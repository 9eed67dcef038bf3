#!/usr/bin/env bash
# The peers' and the tests' packages for a GPU machine that cannot reach a registry, as site folders under .carry/:
#
#   liger/      Liger-Kernel                                     PEERS liger, layers+ligerflce
#   cce/        cut-cross-entropy                                PEERS cce
#   bnb/        bitsandbytes, its CUDA 13 and CPU libraries      workload W4
#   xdist/      pytest-xdist, execnet, pytest-timeout            tests/gpu.sh
#   unsloth/    site.tgz: Unsloth and what it imports            PEERS unsloth
#
# bench_step.py puts a folder on the path of those processes alone that need it. The versions are the
# ones that docs and results name; torch, triton, transformers, peft and accelerate are expected on
# the GPU machine. Usage, from the repository: bash bench/carry.sh [liger cce bnb xdist unsloth]
set -euo pipefail
cd "$(dirname "$0")/.."
PIP="${PYTHON:-python3} -m pip"
FOR=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
for tag in 2_34 2_28 2_27 2_24 2_17; do FOR+=(--platform "manylinux_${tag}_x86_64"); done
FOR+=(--platform manylinux2014_x86_64)

LIGER=(liger_kernel==0.8.5)
CCE=(cut_cross_entropy==25.1.1)
BNB=(bitsandbytes==0.50.2)
XDIST=(pytest_xdist==3.8.0 execnet==2.1.2 pytest_timeout==2.4.0)
UNSLOTH=(
  annotated_types==0.8.0 cut_cross_entropy==25.1.1 datasets==4.8.5 diffusers==0.42.1 dill==0.4.1
  docstring_parser==0.18.0 hf_transfer==0.1.9 json5==0.17.3 msgspec==0.22.0 multiprocess==0.70.19
  nest_asyncio==1.6.0 pydantic==2.14.3 pydantic_core==2.50.4 shtab==1.13.0 structlog==26.1.0
  torchao==0.18.0 trl==1.15.0 typeguard==4.6.0 typing_inspection==0.4.5 tyro==1.0.17
  unsloth==2026.10.9 unsloth_zoo==2026.10.9
)

site() {  # FOLDER REQUIREMENT...: the folder as pip leaves it for Python 3.12
  local folder="$1"
  shift
  rm -rf "$folder" .carry/wheels
  $PIP download --quiet "${FOR[@]}" --dest .carry/wheels "$@"
  $PIP install --quiet --no-index --no-compile "${FOR[@]}" --target "$folder" .carry/wheels/*.whl
  rm -rf .carry/wheels "$folder"/{bin,share}
}

mkdir -p .carry
for peer in ${*:-liger cce bnb xdist unsloth}; do
  case "$peer" in
    liger) site .carry/liger "${LIGER[@]}" ;;
    cce) site .carry/cce "${CCE[@]}" ;;
    xdist) site .carry/xdist "${XDIST[@]}" ;;
    bnb)
      site .carry/bnb "${BNB[@]}"
      find .carry/bnb/bitsandbytes -name 'libbitsandbytes_*' \
        ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete
      ;;
    unsloth)
      site .carry/unsloth/site "${UNSLOTH[@]}"
      rm -rf .carry/unsloth/site/{studio,unsloth_cli}
      tar -C .carry/unsloth -c site | gzip -9 >.carry/unsloth/site.tgz
      rm -rf .carry/unsloth/site
      ;;
    *) echo "unknown: $peer" >&2; exit 2 ;;
  esac
  echo "$peer: $(du -sk ".carry/$peer" | cut -f1) KiB"
done
