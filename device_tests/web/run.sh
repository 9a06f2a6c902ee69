#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for the web, in headless Chromium on this machine.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
# Needs node, and Chromium (or its path in CHROMIUM); npm packages come from EDGEGUARD_NODE_MODULES, or from npm once.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
if [ $# -eq 0 ]; then cd "$root" && exec "$python" -m device_tests run web; fi
export_folder="$(cd "$1" && pwd)" job="$(cd "$2" && pwd)"
cd "$root"
modules="${EDGEGUARD_NODE_MODULES:-$root/device_tests/web/node_modules}"
if [ ! -d "$modules" ]; then (cd device_tests/web && npm ci --no-audit --no-fund); fi
node device_tests/web/browser.mjs "$export_folder" "$job" "$modules"
"$python" -m device_tests.web.measure "$job"
