#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can show, in under 10 minutes: see benchmarks/gpu.py. Results lie in $OUT, by default out/gpu.
#
# benchmarks/gpu.sh                        (with the python3 that finds torch, or PYTHON=/path/to/python)
set -u
cd "$(dirname "$0")/.." || exit 1
exec timeout --kill-after=15 "${LIMIT:-595}" "${PYTHON:-python3}" -u benchmarks/gpu.py --out="${OUT:-out/gpu}" "$@"
