#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for Android: on a phone that adb sees, else on the ARM64 Python of
# arm64.sh under qemu-user (EDGEGUARD_ARM64 names its folder), whose kernels are real and whose timings mean nothing.
# run.sh EXPORT JOB [model.onnx | model.pte]: what JOB holds is in ../README.md. Without arguments: all of it.
set -euo pipefail
target=android model="${3:-model.onnx}"
. "$(dirname "$0")/../job.sh"
device="$(plan device)"
connected() { command -v adb >/dev/null && adb devices | awk '$2 == "device" {found = 1} END {exit !found}'; }
if [ -z "$device" ] && ! connected; then
  if [ -z "${EDGEGUARD_ARM64:-}" ]; then
    echo "adb sees no Android device. To compute with ARM kernels here: device_tests/android/arm64.sh FOLDER," \
      "then EDGEGUARD_ARM64=FOLDER." >&2
    exit 1
  fi
  cd "$root"
  exec "$python" -m device_tests.android.emulated "$export_folder" "$job" "$EDGEGUARD_ARM64"
fi

# A phone: export and job go where apps may read, answers come back from the files of the test app.
adb=(adb ${device:+-s "$device"})
there=/data/local/tmp/edgeguard
package=edgeguard.devicetest
"${adb[@]}" shell rm -rf "$there"
"${adb[@]}" shell mkdir -p "$there"
"${adb[@]}" push --sync "$export_folder/." "$there/export"
"${adb[@]}" push --sync "$job/." "$there/job"
"${adb[@]}" shell chmod -R a+rX "$there"
(cd "$root/device_tests/android/project" && ANDROID_SERIAL="${device:-${ANDROID_SERIAL:-}}" \
  "${GRADLE:-gradle}" --quiet installDebug installDebugAndroidTest)
"${adb[@]}" shell am instrument -w -e model "$model" "$package.test/androidx.test.runner.AndroidJUnitRunner" |
  tee "$job/instrument.log"
# am exits with 0 whatever the test does; a crash has no such line.
grep -q '^OK (1 test)' "$job/instrument.log"
for asked in "$job"/*.jsonl; do
  name="$(basename "$asked").answers"
  "${adb[@]}" exec-out run-as "$package" cat "files/$name" >"$job/$name"
done
"${adb[@]}" exec-out run-as "$package" cat files/measured.json >"$job/measured.json"
