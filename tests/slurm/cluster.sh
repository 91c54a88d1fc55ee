#!/usr/bin/env bash
# A real Slurm of three nodes on this machine, for the tests: slurmctld, three slurmd, munge. Root only.
#
#   tests/slurm/cluster.sh start DIR      # then: export SLURM_CONF=DIR/slurm.conf
#   tests/slurm/cluster.sh kill-node DIR n1    # as a machine that loses power: daemon, step daemons, processes
#   tests/slurm/cluster.sh start-node DIR n1   # and its return
#   tests/slurm/cluster.sh stop DIR
#
# Debian: apt-get install --no-install-recommends slurm-wlm munge. There is no accounting, so no sacct.
set -euo pipefail

# Nodes of 8 GPUs and 16 cores that exist in this file only (config_overrides), so that the scripts' own requests can be
# met; their processes share the machine.
write_config() {
    cat > "$DIR/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$PORT
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MpiDefault=none
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=16 RealMemory=8000 Gres=gpu:8
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=16 RealMemory=8000 Gres=gpu:8
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + 3)) CPUs=16 RealMemory=8000 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    touch "$DIR"/gpu{0..7}
    echo "Name=gpu File=$DIR/gpu[0-7]" > "$DIR/gres.conf"
}

start() {
    mkdir -p "$DIR"/{state,log,munge}
    if ! command -v slurmctld > /dev/null || ! command -v munged > /dev/null; then
        echo "no Slurm here: apt-get install --no-install-recommends slurm-wlm munge" >&2
        exit 3
    fi
    write_config
    # munged wants directories of its own that nobody else writes to; its key is Debian's or a fresh one.
    [ -s "$DIR/munge/key" ] || head -c 1024 /dev/urandom > "$DIR/munge/key"
    chmod 600 "$DIR/munge/key"
    chmod 755 "$DIR" "$DIR/munge"
    munged --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --pid-file="$DIR/munge/pid" \
        --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed"
    slurmctld -c -f "$DIR/slurm.conf"
    start_node n0
    start_node n1
    start_node n2
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --partition=low --states=idle --format=%D 2> /dev/null)" = 3 ] && return 0
        sleep 0.5
    done
    echo "the nodes did not come up:" >&2
    sinfo >&2 || true
    tail -n 20 "$DIR"/log/*.log >&2
    exit 1
}

start_node() {
    mkdir -p "$DIR/spool-$1"
    slurmd -f "$DIR/slurm.conf" -N "$1"
}

# Every descendant of a process, parents first.
descendants() {
    local child
    for child in $(ps -o pid= --ppid "$1"); do
        echo "$child"
        descendants "$child"
    done
}

# Step daemons of a node name the spool directory of their slurmd in no argument, but they keep its log open.
step_daemons() {
    local pid
    for pid in $(pgrep -x slurmstepd || true); do
        if ls -l "/proc/$pid/fd" 2> /dev/null | grep -q "$DIR/log/slurmd-$1.log"; then
            echo "$pid"
        fi
    done
}

kill_node() {
    local pids stepd
    pids=$(cat "$DIR/slurmd-$1.pid")
    for stepd in $(step_daemons "$1"); do
        pids="$pids $stepd $(descendants "$stepd")"
    done
    # All at once: what is still alive would report the rest.
    kill -9 $pids 2> /dev/null || true
    rm -f "$DIR/slurmd-$1.pid"
}

stop() {
    local file
    kill_node n0 2> /dev/null || true
    kill_node n1 2> /dev/null || true
    kill_node n2 2> /dev/null || true
    for file in "$DIR/slurmctld.pid" "$DIR/munge/pid"; do
        if [ -s "$file" ]; then kill "$(cat "$file")" 2> /dev/null || true; fi
    done
}

ACTION=$1
DIR=$(realpath -m "$2")
PORT=${SLURM_TEST_PORT:-16817}
export SLURM_CONF=$DIR/slurm.conf
case $ACTION in
    start) start ;;
    start-node) start_node "$3" ;;
    kill-node) kill_node "$3" ;;
    stop) stop ;;
    *) echo "start, stop, kill-node or start-node, not $ACTION" >&2; exit 2 ;;
esac
