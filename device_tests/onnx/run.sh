#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for onnx on this machine, in plain onnxruntime.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
set -euo pipefail
target=onnx
. "$(dirname "$0")/../job.sh"
cd "$root"
answer check.py
"$python" -m device_tests.onnx.measure "$export_folder" "$job"
