#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment in which XLA compiles for NVIDIA GPUs where there is none, and in which the JAX tests run.
# Usage: bash tests/jax_gpu/make_env.sh PYTHON JAX_VERSION TRITON_VERSION DIRECTORY
# An environment that is there already, made by this script as it is now, is left as it is.
# Needs about 2 GB, and a minute where the wheels download quickly.
set -euo pipefail
python=$1 jax=$2 triton=$3 directory=$4

made=$directory/made-by
wanted="$("$python" -c 'import sys; print(sys.version)') $jax $triton $(cksum <"${BASH_SOURCE[0]}")"
if [[ -f $made && $(<"$made") == "$wanted" ]]; then
    exit
fi

if [[ -e $directory && ! -e $directory/pyvenv.cfg && -n $(ls -A "$directory") ]]; then
    echo "$directory is there and is no virtual environment: name another directory" >&2
    exit 2
fi
rm -rf "$directory"
"$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "jax==$jax" "triton==$triton" flatbuffers ml_dtypes numpy pytest
# the plugin and the compiler alone: what they depend on is for running programs on a GPU
"${pip[@]}" --no-deps "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax"
echo "$wanted" >"$made"
