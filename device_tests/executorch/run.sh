#!/usr/bin/env bash
# Golden vectors, public rows and timings of an Android export's model.pte: on this machine in ExecuTorch's own runtime,
# or with --device ID on that phone.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
if [ $# -eq 0 ]; then cd "$root" && exec "$python" -m device_tests run executorch; fi
export_folder="$(cd "$1" && pwd)" job="$(cd "$2" && pwd)"
device="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["device"] or "")' "$job/plan.json")"
if [ -n "$device" ] && [ "$device" != local ]; then
  exec "$root/device_tests/android/run.sh" "$export_folder" "$job" model.pte
fi
cd "$root"
for asked in "$job"/*.jsonl; do
  # Exit code 2 says that a line is wrong: the driver names it.
  "$python" "$export_folder/check_pte.py" "$asked" >"$asked.answers" || [ $? -eq 2 ]
done
"$python" -m device_tests.executorch.measure "$export_folder" "$job"
