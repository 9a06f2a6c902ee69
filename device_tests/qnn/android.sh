#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for qnn on a Snapdragon phone, over adb. Not run by us yet: we have no
# such phone. android.sh EXPORT JOB SERIAL
# The phone needs Termux's Python, or any Python 3.11 for aarch64 in $PHONE/python with onnxruntime, tokenizers and numpy;
# and in $PHONE/qnn the libraries of the Maven packages com.qualcomm.qti:onnxruntime-android-qnn and
# com.qualcomm.qti:qnn-runtime, of one version (unzip the .aar, jni/arm64-v8a), as a module onnxruntime_qnn.
set -euo pipefail
export_folder="$1" job="$2" serial="$3"
phone="${PHONE:-/data/local/tmp/edgeguard}"
python="${PHONE_PYTHON:-$phone/python/bin/python3}"
root="$(cd "$(dirname "$0")/../.." && pwd)"
run() { adb -s "$serial" shell "$@"; }
run "rm -rf $phone/export $phone/job $phone/source && mkdir -p $phone/source"
adb -s "$serial" push "$export_folder" "$phone/export" >&2
adb -s "$serial" push "$job" "$phone/job" >&2
for part in device_tests edgeguard; do adb -s "$serial" push "$root/$part" "$phone/source/$part" >&2; done
unit="$(sed -n 's/.*"unit": *"\([a-z]*\)".*/\1/p' "$job/plan.json")"
# ADSP_LIBRARY_PATH: where the NPU's own half of the library (libQnnHtpV*Skel.so) lies.
given="cd $phone/source && export UNIT=$unit LD_LIBRARY_PATH=$phone/qnn ADSP_LIBRARY_PATH=$phone/qnn PYTHONPATH=$phone/qnn"
for asked in "$job"/*.jsonl; do
  name="$(basename "$asked")"
  run "$given && { $python $phone/export/check.py $phone/job/$name >$phone/job/$name.answers || [ \$? -eq 2 ]; }"
done
run "$given && $python -m device_tests.qnn.measure $phone/export $phone/job"
for left in "$job"/*.jsonl; do adb -s "$serial" pull "$phone/job/$(basename "$left").answers" "$job/" >&2; done
adb -s "$serial" pull "$phone/job/measured.json" "$job/" >&2
