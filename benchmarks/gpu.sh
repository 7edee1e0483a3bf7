#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that is to be run on an NVIDIA GPU, in one command and less than ten minutes: tests, compute-sanitizer, benchmarks.
# Usage: bash benchmarks/gpu.sh [OUTPUT_FOLDER]         default: benchmarks/results
#        bash benchmarks/gpu.sh --tiny OUTPUT_FOLDER    a rehearsal on the processor: its times mean nothing
# Needs no network, and nothing installed beside what $PYTHON (default: python3) has: torch, triton, jax, pytest, hypothesis,
# tabulate, tqdm. Leaves at most eight files: a summary, a log, tables and plots. Exits with 1 if a stage failed.
set -uo pipefail

tiny=
if [[ ${1:-} == --tiny ]]; then
    tiny=--tiny
    shift
    [[ $# == 1 ]] || { echo "a rehearsal needs an output folder: bash benchmarks/gpu.sh --tiny OUTPUT_FOLDER" >&2 && exit 2; }
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$root/benchmarks/results}" && output=$(cd "${1:-$root/benchmarks/results}" && pwd) && cd "$root" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# JAX otherwise takes three quarters of the GPU's memory at its first call
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor MPLCONFIGDIR=$scratch/matplotlib
export HYPOTHESIS_STORAGE_DIRECTORY=$scratch/hypothesis

log=$output/gpu_log.txt summary=$output/gpu_summary.txt
: >"$log"
: >"$summary"
stages=()

# When the last stage that takes long has to be over, so that there is time for the summary.
deadline=570

# Runs a command for at most so many seconds, and keeps what it printed and how it ended: stage NAME SECONDS COMMAND...
stage() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status=0
    shift 2
    ((limit < left)) || limit=$((left > 1 ? left : 1))
    # interrupted first, so that Python says where it was; a job in the background would not hear that otherwise
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" >"$scratch/$name.out" 2>&1 || status=$?
    case $status in
        0) echo passed ;;
        124 | 137) [[ $name == prepare_* ]] && echo "stopped after $limit s" || echo "FAILED: stopped after $limit s" ;;
        *) echo "FAILED: exit status $status" ;;
    esac >"$scratch/$name.verdict"
    echo "$((SECONDS - start))" >"$scratch/$name.seconds"
    echo "[$SECONDS s] $name: $(<"$scratch/$name.verdict")"
}

not_run() {
    : >"$scratch/$1.out"
    echo "NOT RUN: $2" >"$scratch/$1.verdict"
    echo 0 >"$scratch/$1.seconds"
    echo "[$SECONDS s] $1: $(<"$scratch/$1.verdict")"
}

bench() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$python" -m normkit bench --device cuda $tiny --seconds "${seconds:-0.1}" "$@"
}

has() {
    "$python" -c "import $1" >"$scratch/has" 2>&1
}

stages+=(machine)
stage machine 60 "$python" - <<'PYTHON'
import importlib, platform, shutil, subprocess
print("python", platform.python_version(), platform.platform())
for name in "numpy torch triton jax pytest hypothesis xdist tabulate tqdm matplotlib flax liger_kernel quack flash_attn flashinfer vllm".split():
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "is there"))
    except Exception as error:
        print(name, "cannot be imported:", type(error).__name__, error)
for command in (["nvidia-smi"], ["git", "describe", "--always", "--dirty", "--exclude", "*"]):
    if shutil.which(command[0]):
        print(subprocess.run(command, capture_output=True, text=True).stdout)
PYTHON

# What is not timed runs at once. What the processor alone runs is left out, and cases so large that NumPy takes minutes for the
# reference: the benchmarks verify some rows of such.
tests=(functional gradient_subsets invariance rounding strides properties regressions out out_torch errors_in_place)
tests+=(torch_modules torch_transforms torch_compile jax_gradient jax_vmap jax_transforms jax_modules jax_layers)
selection=("${tests[@]/#/tests/test_}")
selection=("${selection[@]/%/.py}" -k "not (prefill or gpt_2_batch or hidden_16k or hidden_64k or hidden_1m or 2_31)")
interpreted=()
names=(normkit_torch torch vllm liger quack flash_attn flashinfer)
jax=(--samples 20 --cases llama_3_8b_prefill gpt_2_batch hidden_16k qk_norm_prefill)
sweep=(--passes forward backward)
if [[ $tiny ]]; then
    selection=(tests/test_layout_and_plan.py)
    interpreted=(env TRITON_INTERPRET=1)
    names=(normkit_torch torch)
    jax=(--samples 2 --cases gpt_2_batch)
    sweep=(--passes forward --dtypes float32)
    seconds=0.0001
    export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
fi
has xdist && selection+=(-n 8)
stages+=(tests)
# a warning of a version that no one has seen yet is no failure
stage tests 170 "$python" -m pytest -q -p no:cacheprovider -o filterwarnings=default -W "error:Triton could not:RuntimeWarning" --tb=short "${selection[@]}" &

sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
kernels=()
for kernel in $("$python" -c "from normkit import kernels; print(*kernels.__all__)" 2>"$scratch/has"); do
    kernels+=(--kernel-name "kns=$kernel")
done
for tool in memcheck racecheck initcheck; do
    stages+=("$tool")
    if [[ ! $sanitizer ]]; then
        not_run "$tool" "compute-sanitizer is not installed"
        continue
    fi
    # each tensor has memory of its own, so that what is beside it is nobody's
    stage "$tool" 170 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "${kernels[@]}" "${interpreted[@]}" "$python" -m benchmarks.calls $tiny &
done

# Compiles what the benchmarks will call, into the caches above. Triton's kernels are the same for any number of rows.
few=()
for exponent in 7 9 10 11 12 13 14 15 16 17 18 20; do few+=("8x$((2 ** exponent))"); done
by_torch=(--contestants normkit_torch normkit_torch.compile torch.compile --passes forward backward)
by_torch+=(--cases 1048576x128 131072x1024 32768x4096 16384x8192 4096x32768 1024x131072)
sweep+=(--kinds rms --without sum_partials --hidden-sizes 1024 4096 8192 16384 65536)
if [[ ! $tiny ]]; then
    stages+=(prepare_torch prepare_plans prepare_torch_compile)
    seconds=0.000001 bench prepare_torch 170 --contestants normkit_torch --cases "${few[@]}" &
    stage prepare_plans 170 "$python" -m benchmarks.plans "${sweep[@]}" --elements 131072 --seconds 0.000001 \
        --output "$scratch/prepared.csv" &
    seconds=0.000001 bench prepare_torch_compile 170 "${by_torch[@]}" &
fi
wait

stages+=(large torch torch_compile decode jax plans)
stage large 40 "${interpreted[@]}" "$python" -m benchmarks.calls --large $tiny
bench torch 180 --contestants "${names[@]}" --csv "$output/torch_gpu.csv"
# fewer cases, in the same file
if [[ $tiny ]]; then
    not_run torch_compile "it would compile for the processor"
else
    bench torch_compile 80 "${by_torch[@]}" --csv "$scratch/compiled.csv"
    [[ -f $scratch/compiled.csv ]] && tail -n +2 "$scratch/compiled.csv" >>"$output/torch_gpu.csv"
fi
bench decode 45 --contestants "${names[@]}" --kinds rms --passes forward in-place --clocks graph host --csv "$output/torch_decode.csv" \
    --cases {1,2,4,8,16,32,64}x{4096,8192}
stage jax 50 "$python" -m benchmarks.jax_gpu $tiny "${jax[@]}" --output "$output/jax_gpu.csv"
stage plans 50 "${interpreted[@]}" "$python" -m benchmarks.plans $tiny "${sweep[@]}" --output "$output/plans.csv"

for name in torch_gpu torch_decode; do
    stages+=("$name")
    plot=()
    if has matplotlib; then plot=(--plot "$output/$name.svg"); else echo "no plots: matplotlib is not installed" >>"$summary"; fi
    stage "$name" 30 "$python" -m normkit bench --read "$output/$name.csv" "${plot[@]}"
done

failed=0
verdicts=
for name in "${stages[@]}"; do
    { echo "===== $name"; tail -c 800000 "$scratch/$name.out"; } >>"$log"
    verdict=$(<"$scratch/$name.verdict")
    verdicts+=$(printf '%-22s %4d s  %s' "$name" "$(<"$scratch/$name.seconds")" "$verdict")$'\n'
    [[ $verdict != FAILED* ]] || failed=1
    echo "===== $name: $verdict" >>"$summary"
    case $name in
        machine) grep -v 'cannot be imported: ModuleNotFoundError' "$scratch/$name.out" ;;
        tests) grep -E '^(FAILED|ERROR) |(passed|failed|error).* in ' "$scratch/$name.out" | tail -n 25 ;;
        jax | plans | torch_gpu | torch_decode) cat "$scratch/$name.out" ;;
        *) if [[ $verdict == FAILED* ]]; then tail -n 12 "$scratch/$name.out"; fi ;;
    esac | cut -c1-400 >>"$summary"
done
printf '\n%s' "$verdicts" >>"$summary"
cat "$summary"
exit $failed
