# What a training job does on its nodes; mae_vith.slurm and sam_vith.slurm source it after setting CONFIG. Not for login
# nodes. Needs PROJECT, CONFIG, ENGINE, MAX_STARTS_WITHOUT_STEP and the arguments of the job.
#
#   1. give up if the last starts did not get one step further        (the guard)
#   2. preflight on every process; nodes that fail it are left out     (trainer/preflight.py)
#   3. train: one srun task a GPU                                      (trainer/train.py)
#   4. saved on a signal, or died: queue the job again; done, or wrong settings: end

set -u
cd "$PROJECT" || exit 2
PYTHON=${PYTHON:-.venv/bin/python}
LOGS=runs/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$LOGS" || exit 2                           # Slurm makes no folders for logs

# Where the processes meet. The ports follow from the job, so that two jobs on a node do not collide.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))          # below the ports that Linux hands out by itself
export MASTER_ADDR MASTER_PORT

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}         # the loader's processes are the parallelism
TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since Slurm 22.05, srun does not take it over from sbatch

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                # INFO shows which network NCCL chose, and why
# Nodes with several networks: name the interface that reaches the others, for NCCL's start and for gloo, which counts
# samples and saves checkpoints. With InfiniBand, which adapters carry the data.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5
# All 8 GPUs of a node are visible to each process and the local rank picks one: NCCL's direct copies between GPUs need
# that. So there is no --gpus-per-task and no --gpu-bind.

OVERRIDES=("$@")
if [ -n "$ENGINE" ]; then
    OVERRIDES+=("engine.kind=$ENGINE")
fi
ARGUMENTS=("$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"})

# A signal to this shell waits until srun is back: the processes save, the shell decides what comes next.
trap : TERM USR1

say() {
    echo "$(date '+%F %T') $*"
}

# Ask Slurm to start this job again, unless it was cancelled; a job that merely ends here would count as complete. Slurm then
# ends this script and its children; ignoring that signal lets scontrol say whether it worked.
queue_again() {
    if scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
        say "to be queued again: $*"
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        say "Slurm did not queue it again; why, it says above. The same sbatch command goes on from the checkpoint"
        return
    fi
    say "not running any more (cancelled?), not queued again: $*. The same sbatch command goes on from the checkpoint"
}

# 1. The guard: one line a start with the step of the newest checkpoint, -1 if there is none.
step=$("$PYTHON" -m trainer.preflight "${ARGUMENTS[@]}" --print-step) || exit 2
same=$(tac "$LOGS/starts" 2> /dev/null | awk -v step="$step" '$1 != step {exit} {n++} END {print n + 0}')
echo "$step" >> "$LOGS/starts"
say "start ${SLURM_RESTART_COUNT:-0} at step $step on $SLURM_JOB_NODELIST; logs: $LOGS"
if [ "$same" -ge "$MAX_STARTS_WITHOUT_STEP" ]; then
    say "giving up: $same starts at step $step did not bring one new checkpoint; see the ends of $LOGS/rank*.log"
    exit 1
fi

# 2. Preflight. Every process writes a report, so that a node which cannot even do that is known too; then this shell
# reads them. Nodes that fail are excluded and the job is queued again, for others. Slurm changes the excluded nodes of a
# waiting job only, so the job is first held; this shell lives on for a moment (KillWait) and finishes the sentence.
if [ "${PREFLIGHT:-1}" = 1 ]; then
    rm -rf "$LOGS/preflight" "$LOGS/bad_nodes"
    mkdir -p "$LOGS/preflight"
    timeout 120 srun --kill-on-bad-exit=0 --output="$LOGS/preflight/rank%4t.log" \
        "$PYTHON" -m trainer.preflight "${ARGUMENTS[@]}" --reports "$LOGS/preflight"
    case $? in                                       # 128 + 15, 128 + 10: what a stopped process could not say is no finding
        138 | 143) queue_again "stopped by a signal in preflight"; exit 1 ;;
    esac
    "$PYTHON" -m trainer.preflight "${ARGUMENTS[@]}" --judge "$LOGS/preflight" --bad-nodes "$LOGS/bad_nodes" \
        --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" --tasks-per-node "$TASKS_PER_NODE"
    code=$?
    if [ -s "$LOGS/bad_nodes" ]; then
        excluded=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        excluded=$(printf '%s\n' "${excluded/(null)/}" "$(paste -sd, "$LOGS/bad_nodes")" | grep . | paste -sd,)
        say "bad nodes: $(paste -sd, "$LOGS/bad_nodes"); to be queued again without $excluded"
        trap '' TERM
        if ! scontrol requeuehold "$SLURM_JOB_ID"; then
            say "Slurm did not queue it again; why, it says above"
            exit 1
        fi
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded" || say "they could not be excluded"
        scontrol release "$SLURM_JOB_ID"             # in any case: held, it would wait for ever
        exit 0
    fi
    [ "$code" -eq 0 ] || exit "$code"                # settings, paths, data: no other node would do better
fi

# 3. Train. Python is srun's own child, with no shell between, so that signals reach it; it reads its rank from SLURM_*.
# When the first process ends, the others have 60 s: a crash does not leave the rest waiting for the collective timeout.
# --kill-on-bad-exit=0, whatever the site's default: exit code 75 of one process must not kill another's last line.
srun --kill-on-bad-exit=0 --wait=60 --open-mode=append --output="$LOGS/rank%4t.log" \
    "$PYTHON" -m trainer.train "${ARGUMENTS[@]}"
code=$?
say "srun ended with exit code $code"

# 4. Exit codes: docs/checkpoints.md. 75: saved and stopped by a signal. 2: settings or data, 70: it does not learn, 71: out
# of memory; another start would end the same. Everything else is a crash: of a node, of the network, of
# the program. Slurm takes minutes to see that a node is dead (SlurmdTimeout, often 300 s) and would then queue the job
# again by itself; but srun is back before that, and this job must not end as failed. A crash that repeats is the
# guard's business.
case $code in
    0 | 2 | 70 | 71) exit "$code" ;;
    75) queue_again "stopped by a signal, saved" ;;
    *) queue_again "exit code $code; from the newest checkpoint" ;;
esac
exit "$code"
