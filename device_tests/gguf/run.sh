#!/usr/bin/env bash
# Golden vectors, public rows and timings of an export for gguf on this machine, in plain llama.cpp.
# run.sh EXPORT JOB: what JOB holds is in ../README.md. Without arguments: all of it, export included.
set -euo pipefail
target=gguf
. "$(dirname "$0")/../job.sh"
cd "$root"
if [ "$(plan unit)" = gpu ]; then export GPU_LAYERS=-1; else export GPU_LAYERS=0; fi
answer check.py
"$python" -m device_tests.gguf.measure "$export_folder" "$job"
