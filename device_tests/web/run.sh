#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for the web, in headless Chromium on this machine.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
# Needs node, and Chromium (or its path in CHROMIUM); npm packages come from EDGEGUARD_NODE_MODULES, or from npm once.
set -euo pipefail
target=web
. "$(dirname "$0")/../job.sh"
cd "$root"
modules="${EDGEGUARD_NODE_MODULES:-$root/device_tests/web/node_modules}"
if [ ! -d "$modules" ]; then (cd device_tests/web && npm ci --no-audit --no-fund); fi
node device_tests/web/browser.mjs "$export_folder" "$job" "$modules"
"$python" -m device_tests.web.measure "$job"
