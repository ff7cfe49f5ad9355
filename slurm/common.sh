# shellcheck shell=bash
# What the scripts of this folder share: `launch COMMAND...` is a whole job.
#
# begin (check, count this attempt) -> servers, if any -> ranks -> end (say what failed; requeue or give up)

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the repository}" || exit
source slurm/site.env

refuse() {
    echo "error: $*" >&2
    exit 2
}

for name in ROLLOUT_NODES ROLLOUT_SERVERS ROLLOUT_TENSOR ROLLOUT_WAIT_S GRACE_S MAX_FAILURES; do
    [[ ${!name:-} =~ ^[1-9][0-9]*$ || $name=${!name:-} == ROLLOUT_NODES=0 ]] ||
        refuse "$name=${!name:-} is no whole number from 1 on; mend slurm/site.env"
done
[[ ${ROLLOUT_ENGINE:-} =~ ^(sglang|vllm)$ ]] ||
    refuse "ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-} is none of sglang, vllm; mend slurm/site.env"
export MAX_FAILURES  # for the bookkeeping

ATTEMPT=${SLURM_RESTART_COUNT:-0}
# A member of an array goes by the name that its submitter sees.
JOB_LOGS=$LOG_DIR/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
LOGS=$JOB_LOGS/attempt$ATTEMPT
mkdir -p "$LOGS" || refuse "LOG_DIR=$LOG_DIR cannot be written"

# INSIDE: what puts a command into the container on this node; AT_STEP: what does so for a step of srun.
INSIDE=() AT_STEP=()
enter_container() {
    local mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    case $CONTAINER in
        "") ;;
        *.sif)
            [[ -f $CONTAINER ]] || refuse "CONTAINER=$CONTAINER: no such file"
            command -v apptainer >/dev/null || refuse "CONTAINER=$CONTAINER: this node has no apptainer"
            INSIDE=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER")
            ;;
        *)
            [[ $CONTAINER != *.sqsh || -f $CONTAINER ]] || refuse "CONTAINER=$CONTAINER: no such file"
            srun --help | grep -q -e --container-image || refuse "CONTAINER=$CONTAINER: this srun has no pyxis"
            AT_STEP=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
            ;;
    esac
}

bookkeeping() {  # WORDS...: of the package's own command, on one node
    local step=()
    ((${#AT_STEP[@]} == 0)) || step=(srun --nodes=1 --ntasks=1 --overlap "${AT_STEP[@]}")
    "${step[@]}" "${INSIDE[@]}" "$PYTHON" -m megatron_parallel_r1.cluster "$@"
}

split_nodes() {
    local nodes trainers
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    trainers=$((${#nodes[@]} - ROLLOUT_NODES))
    ((trainers >= 1)) || refuse "ROLLOUT_NODES=$ROLLOUT_NODES of ${#nodes[@]} nodes leaves none to train"
    TRAINERS=("${nodes[@]:0:trainers}")
    SERVERS=("${nodes[@]:trainers}")
    export MASTER_ADDR=${TRAINERS[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

step() {  # NAME CPUS NODES...: the words of a srun on these nodes, so many CPUs a task; each task has its log
    local name=$1 cpus=$2 nodes
    shift 2
    nodes=$(IFS=,; echo "$*")
    STEP=(srun --nodes=$# --nodelist="$nodes" --cpus-per-task="$cpus" --kill-on-bad-exit=1
        --unbuffered --output="$LOGS/${name}_%t.log" "${AT_STEP[@]}")
}

start_servers() {  # KIND WORDS...: of the command line
    local words waited=0
    export URLS=$PWD/$LOGS/urls ROLLOUT_ENGINE
    [[ $LOGS != /* ]] || URLS=$LOGS/urls
    words=$(bookkeeping servers "$@")
    mapfile -t words <<<"$words"
    # All servers of a node are one task; a step that names CPUs gets no others of its node.
    step server $((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1})) "${SERVERS[@]}"
    "${STEP[@]}" --ntasks="${#SERVERS[@]}" --ntasks-per-node=1 "${INSIDE[@]}" bash slurm/server.sh \
        "$PYTHON" -m megatron_parallel_r1.cli serve-rollout "${words[@]}" --engine "$ROLLOUT_ENGINE" \
        --servers "$ROLLOUT_SERVERS" --tp "$ROLLOUT_TENSOR" \
        ${ROLLOUT_PYTHON:+--python "$ROLLOUT_PYTHON"} 2>"$LOGS/srun_server.log" &
    SERVING=$!
    until (($(find "$LOGS" -name 'urls.[0-9]*' -type f | wc -l) == ${#SERVERS[@]})); do
        kill -0 "$SERVING" 2>/dev/null || fail_servers "ended before they served"
        ((waited < ROLLOUT_WAIT_S)) || fail_servers "do not serve after ROLLOUT_WAIT_S=$ROLLOUT_WAIT_S s"
        sleep 1
        waited=$((waited + 1))
    done
    find "$LOGS" -name 'urls.[0-9]*' -type f -exec cat {} + >"$URLS"
    export SERVERS_OF_JOB=yes  # to lose them is no mistake of the user's: a requeued job has fresh ones
    TO_SERVERS=("rollout.engine=$ROLLOUT_ENGINE" "rollout.urls_file=$URLS")
}

fail_servers() {
    echo "error: the rollout servers $*" >&2
    conclude server 1
}

# The signal before the time limit: the ranks save and end; if they do not, the job is requeued anyway.
pass_on_stop() {
    SIGNALLED=yes
    echo "asked to stop: the ranks save"
    kill -USR1 "$RANKS" 2>/dev/null || true
    [[ -z ${TIMER:-}${SUBMITIT_EXECUTOR:-} ]] || return 0  # launch.py has a timer of its own
    # `read` waits without a process of its own, which would outlive this job.
    (read -r -t "$GRACE_S" <> <(:) || requeue_unsaved) &
    TIMER=$!
}

requeue_stopped() {
    [[ ${SUBMITIT_EXECUTOR:-} ]] || scontrol requeue "$SLURM_JOB_ID"  # launch.py does it itself
}

requeue_unsaved() {
    echo "not saved within $GRACE_S s, requeued as it is"
    scontrol requeue "$SLURM_JOB_ID"
}

run_ranks() {  # COMMAND...: returns srun's exit code in CODE
    step rank "${SLURM_CPUS_PER_TASK:-1}" "${TRAINERS[@]}"
    # shellcheck disable=SC2206
    local more=($SRUN_WORDS)
    "${STEP[@]}" --ntasks=$((${#TRAINERS[@]} * ${SLURM_NTASKS_PER_NODE:-1})) "${more[@]}" \
        "${INSIDE[@]}" bash slurm/rank.sh "$@" 2>"$LOGS/srun_rank.log" &
    RANKS=$!
    trap pass_on_stop USR1 USR2
    while :; do
        SIGNALLED='' CODE=0
        wait "$RANKS" || CODE=$?
        [[ $SIGNALLED ]] || break  # otherwise a signal ended the wait, not the ranks
    done
    trap '' USR1 USR2
    [[ -z ${TIMER:-} ]] || kill "$TIMER" 2>/dev/null || true
}

end_servers() {
    [[ -n ${SERVING:-} ]] || return 0
    kill -TERM "$SERVING" 2>/dev/null || GONE=yes
    wait "$SERVING" || true
    [[ -z ${GONE:-} ]] || ((CODE != 0)) || fail_servers "ended before the ranks"
}

launch() {  # KIND WORDS...: of the command line
    trap 'requeue_stopped; exit 85' USR1 USR2  # nothing to save yet
    [[ $1 == rl ]] || ROLLOUT_NODES=0  # only there is something to serve for
    enter_container
    split_nodes
    bookkeeping begin "$JOB_LOGS" "$@"
    TO_SERVERS=()
    ((ROLLOUT_NODES == 0)) || start_servers "$@"
    local program=(-m megatron_parallel_r1.cli)
    [[ $1 == eval ]] && program=(eval/run.py) && shift
    run_ranks "$PYTHON" "${program[@]}" "$@" "${TO_SERVERS[@]}"
    end_servers
    conclude rank "$CODE"
}

conclude() {  # STEP CODE: what ended, and how; ends the job
    local verdict=0
    bookkeeping end "$JOB_LOGS" "$LOGS" "$@" || verdict=$?
    case $verdict in
        75) scontrol requeue "$SLURM_JOB_ID" ;;
        85) requeue_stopped ;;
    esac
    exit "$verdict"
}
