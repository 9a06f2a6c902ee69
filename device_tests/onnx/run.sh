#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for onnx on this machine, in plain onnxruntime.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
if [ $# -eq 0 ]; then cd "$root" && exec "$python" -m device_tests run onnx; fi
export_folder="$(cd "$1" && pwd)" job="$(cd "$2" && pwd)"
cd "$root"
for asked in "$job"/*.jsonl; do
  # Exit code 2 says that a line is wrong: the driver names it.
  "$python" "$export_folder/check.py" "$asked" >"$asked.answers" || [ $? -eq 2 ]
done
"$python" -m device_tests.onnx.measure "$export_folder" "$job"
