#!/usr/bin/env bash
#SBATCH --job-name=nemo-image
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#
# The same curation in shares, without a cluster: each task of a Slurm array computes its share of the shards, and the one
# that ends last writes the output. Tasks may run at any time, in any order, on any node.
#
#   sbatch --array=1-16 --cpus-per-task=16 parts.sh /data/in /data/out --model ... --weights ...
#
# Arguments are those of `nemo-image curate`. Shares that failed are run again alone, with the number of all:
#
#   NEMO_IMAGE_PARTS=16 sbatch --array=3,7 parts.sh /data/in /data/out --model ... --weights ...
#
# Settings, as environment variables, with their defaults:
#   PYTHON                 Python with nemo_image                              [python]
#   NEMO_IMAGE_SETUP       file to source first: module load, activate         [none]
#   NEMO_IMAGE_CONTAINER   put before the command: "apptainer exec image.sif"  [none]
#   NEMO_IMAGE_PARTS       number of all shares                                [tasks of the array, which begins with 1]
set -euo pipefail

if [[ -n ${NEMO_IMAGE_SETUP:-} ]]; then
    set +u
    # shellcheck disable=SC1090
    source "$NEMO_IMAGE_SETUP"
    set -u
fi

if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "parts.sh: no task of an array: call it as sbatch --array=1-16 parts.sh ..." >&2
    exit 2
fi
parts=${NEMO_IMAGE_PARTS:-}
if [[ -z $parts ]]; then
    parts=$SLURM_ARRAY_TASK_COUNT
    if [[ $SLURM_ARRAY_TASK_MIN != 1 || $SLURM_ARRAY_TASK_MAX != "$parts" ]]; then
        echo "parts.sh: of how many shares is this number $SLURM_ARRAY_TASK_ID? Set NEMO_IMAGE_PARTS, or --array=1-N" >&2
        exit 2
    fi
fi

read -ra container <<<"${NEMO_IMAGE_CONTAINER:-}"
exec "${container[@]}" "${PYTHON:-python}" -m nemo_image curate "$@" --part "$SLURM_ARRAY_TASK_ID/$parts"
