#!/usr/bin/env bash
# A run on Slurm: a Ray cluster over the job's nodes, the run, and an end.
#   sbatch cluster/slurm.sh cluster=gpu run_dir=/shared/runs/one key=value ...
# It is submitted from the checkout, with the environment active that has the package. The job's exit code is the run's;
# a job that was cut off (time, preemption) and is put in the queue again goes on where it stopped.
#SBATCH --job-name=ddoq-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --output=ddoq-ray-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "use: sbatch cluster/slurm.sh cluster=gpu run_dir=FOLDER key=value ..." >&2
    exit 2
fi

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
    srun --nodes=1 --ntasks=1 --nodelist="$name" --overlap ray start --block --disable-usage-stats \
        --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@" &
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
# Slurm's warning goes on to the run, which ends in words; its code is the job's.
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do  # the signal ended the wait, not the run
    code=0
    wait "$run" || code=$?
done
exit "$code"
