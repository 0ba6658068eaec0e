#!/usr/bin/env bash
# What a GPU is needed to know, in one call of at most eight minutes on one H100: see benchmarks/gpu_check.py.
#
#     benchmarks/gpu_check.sh OUT                                  # everything
#     benchmarks/gpu_check.sh OUT --size tiny --parts attention    # a part, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
