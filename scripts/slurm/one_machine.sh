#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests: starts it in FOLDER, runs COMMAND with SLURM_CONF set, and takes
# the Slurm down again; exits with COMMAND's status. Needs root, and Debian's slurm-wlm and munge:
#
#     apt-get install -y slurm-wlm munge
#     scripts/slurm/one_machine.sh /tmp/slurm sinfo
#
# Settings (environment variables):
#   CPUS_PER_NODE   CPUs that each node has to give, whatever the machine has   [the machine's]
set -euo pipefail

if (($# < 2)); then
    echo "Usage: one_machine.sh FOLDER COMMAND [ARGUMENT...]" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

for program in munged slurmctld slurmd sinfo; do
    command -v "$program" >/dev/null || {
        echo "$program is not installed: apt-get install -y slurm-wlm munge" >&2
        exit 77
    }
done
((EUID == 0)) || {
    echo "Slurm's daemons need root here" >&2
    exit 77
}

host=$(hostname -s)
nodes=(n1 n2)
cpus=${CPUS_PER_NODE:-$(nproc)}

free_ports() {
    python3 -c '
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))' "$1"
}

write_configuration() {
    local ports number
    read -ra ports <<<"$(free_ports $((1 + ${#nodes[@]})))"
    rm -rf "$folder/state" # of an earlier Slurm there, whose jobs would go on
    mkdir -p "$folder/state"
    cat >"$folder/slurm.conf" <<END
ClusterName=one-machine
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/completed.txt
SchedulerParameters=sched_interval=5,bf_interval=5
JobRequeue=1
END
    for number in "${!nodes[@]}"; do
        echo "NodeName=${nodes[number]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[number + 1]} CPUs=$cpus"
    done >>"$folder/slurm.conf"
    echo "PartitionName=all Nodes=$(IFS=,; echo "${nodes[*]}") Default=YES MaxTime=INFINITE State=UP" >>"$folder/slurm.conf"
}

started=() command=''
stop() {
    local pid end
    [[ -z $command ]] || kill "$command" 2>/dev/null || true
    # Jobs would outlive the daemons that watch them.
    timeout 10 scancel --user=root 2>/dev/null || true
    end=$((SECONDS + 30))
    while ((SECONDS < end)) && [[ -n $(timeout 10 squeue --noheader 2>/dev/null) ]]; do sleep 0.2; done
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap stop EXIT
trap 'exit 143' TERM INT

export SLURM_CONF=$folder/slurm.conf
write_configuration
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
# Daemons get sessions of their own: a signal to this script's group must leave them to end the jobs.
setsid munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" \
    >"$folder/munged.out" 2>&1 &
started+=($!)
setsid slurmctld -D >"$folder/slurmctld.out" 2>&1 &
started+=($!)
for node in "${nodes[@]}"; do
    mkdir -p "$folder/spool-$node"
    setsid slurmd -D -N "$node" >"$folder/slurmd-$node.out" 2>&1 &
    started+=($!)
done

deadline=$((SECONDS + 60))
until [[ $(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l) -eq ${#nodes[@]} ]]; do
    if ((SECONDS > deadline)); then
        echo "Slurm's nodes are not idle after a minute; its logs are in $folder:" >&2
        tail -n 5 "$folder"/*.log "$folder"/*.out >&2
        exit 1
    fi
    sleep 0.2
done

status=0
"$@" <&0 &
command=$!
wait "$command" || status=$?
exit "$status"
