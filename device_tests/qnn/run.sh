#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for qnn, on Qualcomm's HTP library (package onnxruntime-qnn).
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
# Where the plan names no device: this machine, which is an emulation of the NPU on x86-64, and the NPU itself on Linux or
# Windows on Snapdragon. Where it names one (adb): an Android phone, see android.sh.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)" root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
if [ $# -eq 0 ]; then cd "$root" && exec "$python" -m device_tests run qnn --no-timing; fi
export_folder="$(cd "$1" && pwd)" job="$(cd "$2" && pwd)"
cd "$root"
device="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["device"] or "")' "$job/plan.json")"
if [ -n "$device" ] && [ "$device" != local ]; then exec "$here/android.sh" "$export_folder" "$job" "$device"; fi
UNIT="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["unit"])' "$job/plan.json")"
export UNIT
for asked in "$job"/*.jsonl; do
  # Exit code 2 says that a line is wrong: the driver names it.
  "$python" "$export_folder/check.py" "$asked" >"$asked.answers" || [ $? -eq 2 ]
done
"$python" -m device_tests.qnn.measure "$export_folder" "$job"
