#!/usr/bin/env bash
# Golden vectors, public rows and timings of an Android export's model.pte: on this machine in ExecuTorch's own runtime,
# or with --device ID on that phone.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
set -euo pipefail
target=executorch
. "$(dirname "$0")/../job.sh"
device="$(plan device)"
if [ -n "$device" ] && [ "$device" != local ]; then
  exec "$root/device_tests/android/run.sh" "$export_folder" "$job" model.pte
fi
cd "$root"
answer check_pte.py
"$python" -m device_tests.executorch.measure "$export_folder" "$job"
