#!/usr/bin/env bash
#SBATCH --job-name=nemo-image
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#
# A Dask cluster on the nodes of a Slurm job, and a command that works on it. Options before the script are sbatch's:
#
#   sbatch --nodes=4 --exclusive curate.sh --cpu /data/in /data/out --model ... --weights ...
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 curate.sh --gpu /data/in /data/out --model ...
#   sbatch --nodes=4 --exclusive curate.sh --cpu -- python my_curation.py
#   sbatch --nodes=4 --exclusive curate.sh --cpu -- nemo-image run flow.yaml --scheduler-file {scheduler_file}
#
# Arguments are those of `nemo-image curate`; after `--` stands any command. In it, {scheduler_file} is replaced by the
# scheduler's file, which is also in the environment: get_client(scheduler_file=os.environ["NEMO_IMAGE_SCHEDULER_FILE"]).
#
# The scheduler and the command run on the job's first node, workers on all nodes: --gpu starts one process a GPU, --cpu
# as many as get_client("cpu") would; by default --gpu where the job has GPUs. Nodes are taken to be alike. The command
# starts when all workers are there, and its exit status is the job's. Then everything is taken down.
#
# Preempted, or from a failed node, Slurm starts the job again (--requeue); two minutes before the time limit it does so
# itself. `nemo-image` commands then go on where they were stopped. `sbatch --no-requeue` turns both off.
#
# Settings, as environment variables (sbatch passes on those of the shell that calls it), with their defaults:
#   PYTHON                        Python with nemo_image, on every node                        [python]
#   NEMO_IMAGE_SETUP              file to source first: module load, activate                  [none]
#   NEMO_IMAGE_CONTAINER          put before each Python command:                              [none]
#                                 "apptainer exec --nv --bind /data image.sif"
#                                 "enroot start --mount /data:/data image"
#   NEMO_IMAGE_SRUN_OPTIONS       more options of each srun. With pyxis (Enroot):              [none]
#                                 "--container-image=image.sqsh --container-mounts=/data,$PWD"
#   NEMO_IMAGE_WORK_DIR           folder that all nodes see, for the scheduler's file          [where sbatch was called]
#   NEMO_IMAGE_LOCAL_DIR          folder on each node, for what workers spill                  [$TMPDIR, or /tmp]
#   NEMO_IMAGE_WORKERS_PER_NODE   worker processes a node                                      [see above]
#   NEMO_IMAGE_THREADS            tasks at once in a worker                                    [CPUs / workers; GPU: 1]
#   NEMO_IMAGE_MEMORY_LIMIT       of a worker, as 16GB; one that exceeds it is started again   [--mem / workers, or auto]
#   NEMO_IMAGE_GPU_OPTIONS        of `dask cuda worker`                                        [--rmm-async --enable-cudf-spill]
#   NEMO_IMAGE_INTERFACE          network interface, such as ib0                               [Dask's choice]
#   NEMO_IMAGE_TLS                1: encrypt, with certificates made for this job (openssl)    [0]
#   NEMO_IMAGE_WAIT_S             seconds that the scheduler and all workers have to start     [600]
#   NEMO_IMAGE_MAX_RESTARTS       so many starts at the time limit are enough                  [50]
set -euo pipefail

if [[ -n ${NEMO_IMAGE_SETUP:-} ]]; then
    set +u
    # shellcheck disable=SC1090
    source "$NEMO_IMAGE_SETUP"
    set -u
fi

say() { echo "$(date '+%F %T') curate.sh: $*" >&2; }

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    say "not in a Slurm job: call it as sbatch curate.sh ..."
    exit 2
fi

# What was asked for ---------------------------------------------------------------------------------------------------

kind=cpu
[[ -z ${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-} ]] || kind=gpu
case ${1:-} in
--cpu | --gpu)
    kind=${1#--}
    shift
    ;;
esac
if (($# == 0)) || [[ $1 == -- && $# -eq 1 ]]; then
    say "nothing to do: give INPUT, OUTPUT and options of nemo-image curate, or -- and a command"
    exit 2
fi

nodes=$SLURM_JOB_NUM_NODES
cpus=${SLURM_CPUS_ON_NODE:-1}
wait_s=${NEMO_IMAGE_WAIT_S:-600}
local_dir=${NEMO_IMAGE_LOCAL_DIR:-${TMPDIR:-/tmp}}
work=${NEMO_IMAGE_WORK_DIR:-$SLURM_SUBMIT_DIR}/nemo-image-job-$SLURM_JOB_ID
export NEMO_IMAGE_SCHEDULER_FILE=$work/scheduler.json
export DASK_LOGGING__DISTRIBUTED=${DASK_LOGGING__DISTRIBUTED:-warning}

# A container's command and srun's options are lists of words.
read -ra container <<<"${NEMO_IMAGE_CONTAINER:-}"
read -ra srun_options <<<"${NEMO_IMAGE_SRUN_OPTIONS:-}"
read -ra gpu_options <<<"${NEMO_IMAGE_GPU_OPTIONS:---rmm-async --enable-cudf-spill}"
python=("${container[@]}" "${PYTHON:-python}")

# Each step may use all CPUs of the job; Slurms that bind steps to some are told not to.
binding=()
if scontrol show config | grep -Eq '^TaskPlugin +=.*(affinity|cgroup)'; then binding=(--cpu-bind=none); fi

step() { srun --input=none --unbuffered --overlap "${binding[@]}" "${srun_options[@]}" "$@"; }
on_head() { step --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "$@"; }

"${python[@]}" -c 'import nemo_image, distributed' || {
    say "${python[*]} has no nemo_image on $SLURMD_NODENAME: set PYTHON, NEMO_IMAGE_SETUP or NEMO_IMAGE_CONTAINER"
    exit 1
}

# Signals, and the end -------------------------------------------------------------------------------------------------

command='' scheduler='' workers='' restart=no

alive() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

# Stop a step: ask, then, after ten seconds, insist.
stop() {
    local end=$((SECONDS + 10))
    alive "$1" || return 0
    kill -TERM "$1" 2>/dev/null || true
    while alive "$1" && ((SECONDS < end)); do sleep 0.1; done
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

clean_up() {
    trap '' TERM INT USR1
    stop "$command"
    stop "$workers"
    stop "$scheduler"
    rm -rf "$work"
}

start_again() {
    local starts=${SLURM_RESTART_COUNT:-0}
    if ((starts >= ${NEMO_IMAGE_MAX_RESTARTS:-50})); then
        say "started again $starts times: no more (NEMO_IMAGE_MAX_RESTARTS). Submit it again to go on"
        exit 75
    fi
    say "told to stop (USR1, the time limit is near): the job is queued again, and goes on where it was"
    clean_up
    scontrol requeue "$SLURM_JOB_ID" || {
        say "it cannot be queued again: submit it again to go on"
        exit 75
    }
    exit 0
}

trap clean_up EXIT
trap 'say "told to stop (TERM)"; exit 143' TERM INT
trap 'restart=yes' USR1

# Return when process $1 has ended, or fail when a part of the cluster that it needs has.
wait_for() {
    while alive "$1"; do
        [[ $restart == no ]] || start_again
        if ! alive "$workers"; then
            say "all workers have ended; their messages are above"
            return 1
        fi
        sleep 0.2
    done
}

# The cluster ----------------------------------------------------------------------------------------------------------

rm -rf "$work" # of the job before it was queued again
mkdir -p "$work"
chmod 700 "$work"

protocol=()
if [[ ${NEMO_IMAGE_TLS:-0} == 1 ]]; then
    openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj "/CN=nemo-image-job-$SLURM_JOB_ID" \
        -keyout "$work/key.pem" -out "$work/cert.pem" 2>"$work/openssl.log" || {
        cat "$work/openssl.log" >&2
        exit 1
    }
    export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true DASK_DISTRIBUTED__COMM__TLS__CA_FILE=$work/cert.pem
    for role in SCHEDULER WORKER CLIENT; do
        export "DASK_DISTRIBUTED__COMM__TLS__${role}__CERT=$work/cert.pem"
        export "DASK_DISTRIBUTED__COMM__TLS__${role}__KEY=$work/key.pem"
    done
    protocol=(--protocol tls)
fi
interface=()
[[ -z ${NEMO_IMAGE_INTERFACE:-} ]] || interface=(--interface "$NEMO_IMAGE_INTERFACE")

if [[ $kind == gpu ]]; then
    gpus=${SLURM_GPUS_ON_NODE:-}
    visible=${CUDA_VISIBLE_DEVICES:-0}
    per_node=${NEMO_IMAGE_WORKERS_PER_NODE:-${gpus:-$(awk -F, '{print NF}' <<<"$visible")}}
    threads=${NEMO_IMAGE_THREADS:-1}
    worker=(cuda worker "${gpu_options[@]}")
else
    per_node=${NEMO_IMAGE_WORKERS_PER_NODE:-$("${python[@]}" -c \
        'import sys; from distributed.deploy.utils import nprocesses_nthreads as f; print(f(int(sys.argv[1]))[0])' "$cpus")}
    threads=${NEMO_IMAGE_THREADS:-$((cpus / per_node > 0 ? cpus / per_node : 1))}
    worker=(worker --nworkers "$per_node")
fi
memory=${NEMO_IMAGE_MEMORY_LIMIT:-}
[[ -n $memory || -z ${SLURM_MEM_PER_NODE:-} || ${SLURM_MEM_PER_NODE:-0} == 0 ]] || memory=$((SLURM_MEM_PER_NODE / per_node))MiB
export NEMO_IMAGE_CPUS_PER_WORKER=$((cpus / per_node > 0 ? cpus / per_node : 1))

say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes nodes, $per_node workers of $threads threads on each ($kind)"
on_head "${python[@]}" -m dask scheduler --scheduler-file "$NEMO_IMAGE_SCHEDULER_FILE" --port 0 --dashboard-address :0 \
    "${protocol[@]}" "${interface[@]}" &
scheduler=$!
# A node that fails takes no other with it: --wait=0, --kill-on-bad-exit=0.
step --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --wait=0 --kill-on-bad-exit=0 \
    "${python[@]}" -m dask "${worker[@]}" --scheduler-file "$NEMO_IMAGE_SCHEDULER_FILE" --nthreads "$threads" \
    --memory-limit "${memory:-auto}" --local-directory "$local_dir" --no-dashboard --death-timeout "$wait_s" \
    "${protocol[@]}" "${interface[@]}" &
workers=$!

end=$((SECONDS + wait_s))
until [[ -s $NEMO_IMAGE_SCHEDULER_FILE ]]; do
    [[ $restart == no ]] || start_again
    if ! alive "$scheduler" || ! alive "$workers" || ((SECONDS > end)); then
        say "the scheduler did not start; its messages are above"
        exit 1
    fi
    sleep 0.2
done
on_head "${python[@]}" -c '
import sys
from nemo_image import get_client
from nemo_image.errors import NemoImageError
try:
    get_client(scheduler_file=sys.argv[1], n_workers=int(sys.argv[2]), timeout=float(sys.argv[3])).close()
except NemoImageError as error:
    sys.exit(f"Error: {error}")
' "$NEMO_IMAGE_SCHEDULER_FILE" "$((nodes * per_node))" "$((end - SECONDS))" &
command=$!
wait_for "$command"
wait "$command" || exit 1
say "all $((nodes * per_node)) workers are there"

# The command ----------------------------------------------------------------------------------------------------------

if [[ $1 == -- ]]; then
    shift
    on_head "${container[@]}" "${@//'{scheduler_file}'/$NEMO_IMAGE_SCHEDULER_FILE}" &
else
    on_head "${python[@]}" -m nemo_image curate --scheduler-file "$NEMO_IMAGE_SCHEDULER_FILE" "$@" &
fi
command=$!
wait_for "$command"
status=0
wait "$command" || status=$?
say "the command ended with status $status"
exit "$status"
