#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for iOS in Core ML: on the device of --device ID, else on this Mac.
# Where there is no Mac, numpy carries out the package's operators in FP16: correctness alone, marked as emulated.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
# Needs Xcode 16 and XcodeGen (brew install xcodegen); for a phone, TEAM names the development team that signs.
set -euo pipefail
target=ios
. "$(dirname "$0")/../job.sh"
device="$(plan device)"
if ! command -v xcodebuild >/dev/null; then
  if [ -n "$device" ]; then echo "xcodebuild is not installed: the device $device needs a Mac with Xcode." >&2; exit 1; fi
  cd "$root"
  exec "$python" -m device_tests.ios.emulated "$export_folder" "$job"
fi

# The test bundle carries export and job; what the test finds comes back as attachments.
project="$root/device_tests/ios/project"
rm -rf "$project/payload" "$job/result.xcresult" "$job/attachments"
mkdir -p "$project/payload"
cp -R "$export_folder" "$project/payload/export"
unzip -q "$export_folder/model.mlpackage.zip" -d "$project/payload/export"
cp -R "$job" "$project/payload/job"
(cd "$project" && xcodegen --quiet)
destination="platform=macOS"
if [ -n "$device" ] && [ "$device" != local ]; then destination="id=$device"; fi
xcodebuild test -quiet -project "$project/EdgeGuardDeviceTest.xcodeproj" -scheme EdgeGuardDeviceTest \
  -destination "$destination" -resultBundlePath "$job/result.xcresult" -allowProvisioningUpdates \
  ${TEAM:+DEVELOPMENT_TEAM="$TEAM"}
xcrun xcresulttool export attachments --path "$job/result.xcresult" --output-path "$job/attachments"
"$python" -m device_tests.ios.attachments "$job"
