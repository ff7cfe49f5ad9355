# shellcheck shell=bash
# The launcher of all jobs, submitted by sbatch or by launch.py: `launch KIND ARGUMENTS...` runs one. REPOSITORY is set.
#
# begin (validate, record the attempt) -> rollout servers, if any -> ranks -> end (report; requeue or give up)

cd "$SLURM_SUBMIT_DIR" || exit
source "$REPOSITORY/slurm/site.env"
# With `sbatch --export=NONE` srun would start tasks without this environment.
export SLURM_EXPORT_ENV=ALL REPOSITORY PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
# Seconds that a requeue may take before SLURM ends the job.
MARGIN_S=10
# Seconds that the controller has to answer: its clients alone wait for minutes. SIGKILL, for they may inherit that SIGTERM
# is ignored.
ANSWER_S=10

refuse() {
    echo "error: $*" >&2
    exit 2
}

for name in ROLLOUT_NODES ROLLOUT_SERVERS ROLLOUT_TENSOR ROLLOUT_WAIT_S GRACE_S MAX_FAILURES MAX_STOPS; do
    [[ ${!name:-} =~ ^[1-9][0-9]*$ || $name=${!name:-} == ROLLOUT_NODES=0 ]] ||
        refuse "$name=${!name:-} is not an integer >= 1; edit slurm/site.env"
done
[[ ${ROLLOUT_ENGINE:-} =~ ^(sglang|vllm)$ ]] ||
    refuse "ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-} is not one of sglang, vllm; edit slurm/site.env"
export MAX_FAILURES MAX_STOPS  # for the bookkeeping
[[ -z ${SLURM_HET_SIZE:-} ]] || refuse "a heterogeneous job has $SLURM_HET_SIZE parts, this script runs in one; drop the :"
TASKS=$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
[[ ${SLURM_NTASKS:-$TASKS} == "$TASKS" ]] || refuse "--ntasks=$SLURM_NTASKS, but ${SLURM_JOB_NUM_NODES:-1} nodes of" \
    "--ntasks-per-node=${SLURM_NTASKS_PER_NODE:-1} have $TASKS tasks; give --nodes and --ntasks-per-node alone"
# Programs of the repository, for jobs submitted from elsewhere.
for name in PYTHON ROLLOUT_PYTHON; do
    [[ ! -x $REPOSITORY/${!name} || ${!name} != */* || -z ${!name} ]] || declare "$name=$REPOSITORY/${!name}"
done

ATTEMPT=${SLURM_RESTART_COUNT:-0}
# The id that squeue and launch.py show. SLURM_JOB_ID of the last task of an array stands for the whole array.
JOB=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
JOB_LOGS=$LOG_DIR/$SLURM_JOB_NAME-$JOB
LOGS=$JOB_LOGS/attempt$ATTEMPT
mkdir -p "$LOGS" || refuse "LOG_DIR=$LOG_DIR cannot be written"

# Two ways into a container: IN_CONTAINER prefixes a command, CONTAINER_OPTIONS are options of srun (pyxis).
IN_CONTAINER=() CONTAINER_OPTIONS=()
enter_container() {
    local mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    [[ $PWD/ == "$REPOSITORY"/* ]] || mounts+=",$REPOSITORY:$REPOSITORY"
    case $CONTAINER in
        "") ;;
        *.sif)
            [[ -f $CONTAINER ]] || refuse "CONTAINER=$CONTAINER: no such file"
            command -v apptainer >/dev/null || refuse "CONTAINER=$CONTAINER: this node has no apptainer"
            IN_CONTAINER=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER")
            ;;
        *)
            [[ $CONTAINER != *.sqsh || -f $CONTAINER ]] || refuse "CONTAINER=$CONTAINER: no such file"
            srun --help | grep -q -e --container-image || refuse "CONTAINER=$CONTAINER: this srun has no pyxis"
            CONTAINER_OPTIONS=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
            ;;
    esac
}

bookkeeping() {  # ARGUMENTS...: runs megatron_parallel_r1.cluster on one node
    local prefix=()
    ((${#CONTAINER_OPTIONS[@]} == 0)) || prefix=(srun --nodes=1 --ntasks=1 --overlap "${CONTAINER_OPTIONS[@]}")
    "${prefix[@]}" "${IN_CONTAINER[@]}" "$PYTHON" -m megatron_parallel_r1.cluster "$@"
}

split_nodes() {
    local nodes trainers
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    trainers=$((${#nodes[@]} - ROLLOUT_NODES))
    ((trainers >= 1)) || refuse "ROLLOUT_NODES=$ROLLOUT_NODES of ${#nodes[@]} nodes leaves none for training"
    TRAINERS=("${nodes[@]:0:trainers}")
    SERVERS=("${nodes[@]:trainers}")
    export MASTER_ADDR=${TRAINERS[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

prepare_step() {  # NAME CPUS NODES...: sets STEP to the srun command; CPUs per task, one log file per task
    local name=$1 cpus=$2 nodes
    shift 2
    nodes=$(IFS=,; echo "$*")
    STEP=(srun --nodes=$# --nodelist="$nodes" --cpus-per-task="$cpus" --kill-on-bad-exit=1
        --unbuffered --output="$LOGS/${name}_%t.log" "${CONTAINER_OPTIONS[@]}")
}

# Sets SPAN, the nodes that one rollout server takes: several if it has more GPUs than a node.
span_nodes() {
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    export SPAN=1
    ((gpus > 0 && ROLLOUT_TENSOR > gpus)) || return 0
    SPAN=$((ROLLOUT_TENSOR / gpus))
    [[ $ROLLOUT_ENGINE == sglang ]] || refuse "ROLLOUT_TENSOR=$ROLLOUT_TENSOR is more than the $gpus GPUs of a node," \
        "which only ROLLOUT_ENGINE=sglang can have"
    ((ROLLOUT_TENSOR % gpus == 0)) || refuse "ROLLOUT_TENSOR=$ROLLOUT_TENSOR does not divide into nodes of $gpus GPUs"
    ((ROLLOUT_SERVERS == 1)) || refuse "a server of ROLLOUT_TENSOR=$ROLLOUT_TENSOR takes $SPAN nodes of $gpus GPUs whole;" \
        "set ROLLOUT_SERVERS=1"
    ((ROLLOUT_NODES % SPAN == 0)) || refuse "ROLLOUT_NODES=$ROLLOUT_NODES is not a multiple of the $SPAN nodes that a" \
        "server of ROLLOUT_TENSOR=$ROLLOUT_TENSOR takes"
}

start_servers() {  # KIND ARGUMENTS...
    local arguments waited=0
    export URLS=$PWD/$LOGS/urls ROLLOUT_ENGINE SERVER_NODES="${SERVERS[*]}"
    [[ $LOGS != /* ]] || URLS=$LOGS/urls
    arguments=$(bookkeeping servers "$@")
    mapfile -t arguments <<<"$arguments"
    # All servers of a node are one task and share all CPUs that the job has there.
    prepare_step server $((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1})) "${SERVERS[@]}"
    "${STEP[@]}" --ntasks="${#SERVERS[@]}" --ntasks-per-node=1 "${IN_CONTAINER[@]}" bash "$REPOSITORY/slurm/server.sh" \
        "$PYTHON" -m megatron_parallel_r1.cli serve-rollout "${arguments[@]}" --engine "$ROLLOUT_ENGINE" \
        --servers "$ROLLOUT_SERVERS" --tp "$ROLLOUT_TENSOR" \
        ${ROLLOUT_PYTHON:+--python "$ROLLOUT_PYTHON"} 2>"$LOGS/srun_server.log" &
    SERVING=$!
    until (($(find "$LOGS" -name 'urls.[0-9]*' -type f | wc -l) == ${#SERVERS[@]} / SPAN)); do
        kill -0 "$SERVING" 2>/dev/null || fail_servers "ended before they were ready"
        ((waited < ROLLOUT_WAIT_S)) || fail_servers "are not ready after ROLLOUT_WAIT_S=$ROLLOUT_WAIT_S s"
        sleep 1
        waited=$((waited + 1))
    done
    find "$LOGS" -name 'urls.[0-9]*' -type f -exec cat {} + >"$URLS"
    export SERVERS_OF_JOB=yes  # losing them is not a user error: a requeued job starts new ones
    SERVER_OVERRIDES=("rollout.engine=$ROLLOUT_ENGINE" "rollout.urls_file=$URLS")
}

fail_servers() {
    echo "error: the rollout servers $*" >&2
    conclude server 1
}

# The signal before the time limit or of a preemption: the ranks save and exit. If that takes longer than GRACE_S, or than
# SLURM leaves them, the step under way is given up for the last checkpoint.
forward_stop() {
    SIGNALLED=yes
    echo "stop requested: the ranks save and exit"
    kill -USR1 "$RANKS" 2>/dev/null || true
    [[ -z ${TIMER:-} ]] || return 0
    ask_controller
    GRACE_LEFT_S=$((LEFT_S - MARGIN_S < GRACE_S ? LEFT_S - MARGIN_S : GRACE_S))
    {
        # A timeout of `read`, because a `sleep` process would outlive the job.
        ((GRACE_LEFT_S <= 0)) || read -r -t "$GRACE_LEFT_S" <> <(:) || true
        give_up_step
    } &
    TIMER=$!
}

give_up_step() {
    local why="not saved within $GRACE_LEFT_S s"
    echo "$why; requeued unsaved"
    echo "$why" >"$LOGS/stopped"
    requeue
}

# Sets LEFT_S, the seconds until SLURM ends the job, JOB_LIMIT_S, those from the job's start to its end, PREEMPTED if it is
# being preempted, and RESTARTS, how often SLURM has requeued it. Without an answer there is time enough.
ask_controller() {
    local job
    LEFT_S=999999999 JOB_LIMIT_S='' PREEMPTED='' RESTARTS=$ATTEMPT
    job=$(timeout -s KILL "$ANSWER_S" scontrol show job --oneliner "$JOB" 2>/dev/null) || return 0
    if [[ $job == *" PreemptTime="[0-9]* ]]; then PREEMPTED=yes; fi
    if [[ $job =~ \ Restarts=([0-9]+) ]]; then RESTARTS=${BASH_REMATCH[1]}; fi
    if [[ $job =~ \ EndTime=([0-9T:-]+) ]]; then
        LEFT_S=$(($(date -d "${BASH_REMATCH[1]}" +%s) - $(date +%s))) JOB_LIMIT_S=$((LEFT_S + SECONDS))
    fi
}

# SLURM ends the job: a preemption without grace, a requeue, a lost node, `scancel`. The next attempt reads the reason.
ended_by_slurm() {
    [[ -f $LOGS/stopped ]] || echo "ended by SLURM: preempted, requeued or out of time" >"$LOGS/stopped"
    exit 143
}

# A stop signal while there is nothing to save.
stop_early() {
    trap '' USR1 USR2
    echo "stopped by a signal before the ranks started" >"$LOGS/stopped"
    conclude stop 85
}

# Repeats while the controller does not answer, even beyond the time limit, which it could not enforce meanwhile.
requeue() {
    local answer code
    trap '' TERM
    while :; do
        code=0
        answer=$(timeout -s KILL "$ANSWER_S" scontrol requeue "$JOB" 2>&1) || code=$?
        [[ $code != 0 && $answer != *"pending execution"* ]] || return 0  # SLURM may have requeued it meanwhile
        [[ $code == 137 || $answer =~ [Uu]nable\ to\ contact|connect|[Tt]imed\ out|[Cc]ommunication ]] ||
            refuse "not requeued: $answer"
        echo "not requeued yet, for the controller does not answer${answer:+: $answer}"
        sleep 2
    done
}

run_ranks() {  # COMMAND...: sets CODE to srun's exit code
    prepare_step rank "${SLURM_CPUS_PER_TASK:-1}" "${TRAINERS[@]}"
    # shellcheck disable=SC2206
    local options=($SRUN_WORDS)
    "${STEP[@]}" --ntasks=$((${#TRAINERS[@]} * ${SLURM_NTASKS_PER_NODE:-1})) "${options[@]}" \
        "${IN_CONTAINER[@]}" bash "$REPOSITORY/slurm/rank.sh" "$@" 2>"$LOGS/srun_rank.log" &
    RANKS=$!
    trap forward_stop USR1 USR2
    while :; do
        SIGNALLED='' CODE=0
        wait "$RANKS" || CODE=$?
        [[ $SIGNALLED ]] || break  # else a signal interrupted `wait`
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

launch() {  # KIND ARGUMENTS...
    trap ended_by_slurm TERM
    trap stop_early USR1 USR2
    [[ $1 == rl || $1 == distill ]] || ROLLOUT_NODES=0  # other jobs use no servers
    enter_container
    split_nodes
    ((ROLLOUT_NODES == 0)) || span_nodes
    ask_controller
    export JOB_LIMIT_S PREEMPTED JOB_RANKS=$((${#TRAINERS[@]} * ${SLURM_NTASKS_PER_NODE:-1}))
    bookkeeping begin "$JOB_LOGS" "$@"
    SERVER_OVERRIDES=()
    ((ROLLOUT_NODES == 0)) || start_servers "$@"
    local program=(-m megatron_parallel_r1.cli)
    [[ $1 == eval ]] && program=("$REPOSITORY/eval/run.py") && shift
    run_ranks "$PYTHON" "${program[@]}" "$@" "${SERVER_OVERRIDES[@]}"
    end_servers
    conclude rank "$CODE"
}

launch_doctor() {  # ARGUMENTS...: the checks of `parallel-r1 doctor` on all nodes; no requeue
    ROLLOUT_NODES=0
    enter_container
    split_nodes
    run_ranks "$PYTHON" -m megatron_parallel_r1.cli doctor "$@"
    cat "$LOGS/rank_0.log"
    exit "$CODE"
}

# Leaves nodes on which this job has failed twice out of its next attempt, if the partition has enough others. Only a job
# that is queued may change.
exclude_nodes() {
    local bad job excluded others
    bad=$(<"$JOB_LOGS/bad_nodes")
    others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,alloc,mix,comp --format=%N |
        sort -u | grep -cvxF "${bad//,/$'\n'}") || true
    if ((others < SLURM_JOB_NUM_NODES)); then
        echo "failed twice on $bad, which stays in use: the partition has only $others other nodes"
        return
    fi
    job=$(scontrol show job --oneliner "$JOB") || return 0
    [[ ! $job =~ \ ExcNodeList=([^\ \(]+) ]] || excluded=${BASH_REMATCH[1]},
    if scontrol update JobId="$JOB" ExcNodeList="${excluded:-}$bad"; then
        echo "failed twice on $bad: left out of the next attempt"
    fi
}

conclude() {  # STEP CODE: reports how the step ended; requeues or ends the job
    local code=0
    trap '' TERM  # of a preemption, or of this function's own requeue
    ask_controller
    [[ $RESTARTS == "$ATTEMPT" ]] || ended_by_slurm  # also if this node hung, and the job runs elsewhere meanwhile
    bookkeeping end "$JOB_LOGS" "$LOGS" "$@" || code=$?
    [[ $code != 75 && $code != 85 ]] || requeue
    [[ $code != 75 || ! -s $JOB_LOGS/bad_nodes ]] || exclude_nodes
    exit "$code"
}
