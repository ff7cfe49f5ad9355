#!/usr/bin/env bash
# Evaluation: sbatch slurm/eval.sh --checkpoint RELEASE --benchmarks NAMES --mode MODE ...  (docs/evaluation.md)
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
##SBATCH --account=yours
##SBATCH --partition=yours
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the repository}/slurm/common.sh"
launch eval "$@"
