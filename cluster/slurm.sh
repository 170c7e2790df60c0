#!/usr/bin/env bash
# A run on Slurm: a Ray cluster over the job's nodes, the run, and an end.
#   sbatch cluster/slurm.sh cluster=gpu run_dir=/shared/runs/one key=value ...
# It is submitted from the checkout, with the environment active that has the package. The job's exit code is the run's;
# a job whose time is over is put in the queue again, as Slurm does with one that was preempted, and goes on where it
# stopped. `scancel` ends it.
#SBATCH --job-name=ddoq-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
# Whole nodes: Ray takes the machine's memory for its own, and its ports and /tmp/ray would meet another job's.
#SBATCH --exclusive
#SBATCH --mem=0
# A node that fails ends what worked there, not the job.
#SBATCH --no-kill
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --output=ddoq-ray-%j.log
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "use: sbatch cluster/slurm.sh cluster=gpu run_dir=FOLDER key=value ..." >&2
    exit 2
fi

# Signals go on to the run, which ends in words; its code is the job's. Slurm's warning is USR1, scancel's is TERM.
run="" signals=0 again=""
# shellcheck disable=SC2329  # the traps call it
stop() {
    signals=$((signals + 1))
    [ -z "$run" ] || kill -TERM "$run" 2>/dev/null || true
}
trap stop TERM
trap 'again=yes; stop' USR1

# Of this job alone. In the environment only: a command line is seen by every user of a node.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 20000))
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I)
address="${ip%% *}:$port"

running=()
node() {  # node NAME OPTION...: a Ray node that lives as long as this job's step
    local name=$1
    shift
    # srun does not take --cpus-per-task from the job: all of Ray would be on one core.
    local cpus=${SLURM_CPUS_PER_TASK:-1}
    srun --nodes=1 --ntasks=1 --nodelist="$name" --cpus-per-task="$cpus" --overlap ray start --block \
        --disable-usage-stats --num-cpus="$cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@" &
    running+=($!)
}

# shellcheck disable=SC2329  # the trap calls it
end() {
    trap - EXIT
    kill "${running[@]}" 2>/dev/null || true
    wait
}
trap end EXIT

node "$head" --head --node-ip-address="${ip%% *}" --port="$port" --include-dashboard=false
for _ in $(seq 60); do  # workers that find no head give up
    if python -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)' \
        "${ip%% *}" "$port" 2>/dev/null; then
        break
    fi
    sleep 1
done
for name in "${nodes[@]:1}"; do
    node "$name" --address="$address"
done

python -m ddoq_ray "$@" cluster.address="$address" &
run=$!
[ "$signals" -eq 0 ] || stop  # one came while Ray was being started
heard=-1
until [ "$heard" -eq "$signals" ]; do  # a signal ends the wait, not the run
    heard=$signals
    code=0
    wait "$run" || code=$?
done
if [ -n "$again" ] && [ "$code" -eq 143 ]; then  # stopped, not finished at the last moment
    echo "slurm.sh: the job's time is over; it is put in the queue again" >&2
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: it could not be; submit it again, and it goes on" >&2
fi
exit "$code"
