#!/usr/bin/env bash
# What the first hour would find out, on all nodes: sbatch slurm/doctor.sh [--out FOLDER] [--engine ENGINE]
#SBATCH --job-name=doctor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=00:20:00
##SBATCH --account=yours
##SBATCH --partition=yours
#SBATCH --no-requeue
#SBATCH --output=%x-%j.out
set -euo pipefail
# sbatch runs a copy of this script: the repository is where it was submitted from, or where it lies.
lies=$(scontrol show job --oneliner "${SLURM_JOB_ID:?submit this script with sbatch}" |
    sed -En '1s|.* Command=(/\S*)/slurm/.*|\1|p') || true
for REPOSITORY in "$SLURM_SUBMIT_DIR" "$lies"; do [[ ! -f $REPOSITORY/slurm/common.sh ]] || break; done
source "$REPOSITORY/slurm/common.sh"
launch_doctor "$@"
