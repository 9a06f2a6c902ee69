#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for qnn, on Qualcomm's HTP library (package onnxruntime-qnn).
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
# Where the plan names no device: this machine, which is an emulation of the NPU on x86-64, and the NPU itself on Linux or
# Windows on Snapdragon. Where it names one (adb): an Android phone, see android.sh.
set -euo pipefail
target=(qnn --no-timing)
. "$(dirname "$0")/../job.sh"
device="$(plan device)"
cd "$root"
if [ -n "$device" ] && [ "$device" != local ]; then
  exec "$root/device_tests/qnn/android.sh" "$export_folder" "$job" "$device"
fi
UNIT="$(plan unit)"
export UNIT
answer check.py
"$python" -m device_tests.qnn.measure "$export_folder" "$job"
