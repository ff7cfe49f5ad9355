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
source "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the repository}/slurm/common.sh"
launch_doctor "$@"
