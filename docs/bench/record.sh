#!/usr/bin/env bash
# Records what is stated of edgeguard's speed: every run as JSON with all trials, its tables, and plots, beside this file.
#   docs/bench/record.sh NAME       NAME: of the machine; the names of all files begin with it
#   docs/bench/record.sh -n NAME    print the commands, run none
# Needs a checkout without changes, '.[convert,gguf,bench]' installed, and a machine that does nothing else: about
# 25 minutes on 2 cores, 6 GB of memory, 3 GB of disk in the cache folder. THREADS (2) and PYTHON (python) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} threads=${THREADS:-2}
dry=
if [ "${1:-}" = -n ]; then dry=1 && shift; fi
name=${1:?the name of this machine, for example zen4-2cores}
out=docs/bench/$name

if [ -z "$dry" ]; then
  changed=$(git status --porcelain --untracked-files=no)
  if [ -n "$changed" ]; then echo "commit first: a record names the commit that it measured" >&2 && exit 1; fi
  if [ -r /proc/loadavg ] && ! awk '{ exit !($1 < 0.5) }' /proc/loadavg; then
    echo "the load average is $(cut -d' ' -f1 /proc/loadavg): wait until nothing else runs" >&2 && exit 1
  fi
fi

bench() {
  echo "edgeguard bench $*"
  if [ -z "$dry" ]; then "$python" -m edgeguard bench "$@" >/dev/null; fi
}

# The 1B-INT4 shape beside llama.cpp and plain onnxruntime: ratios, share of the INT8 peak, memory with and without INT8.
bench --shape llama-guard-3-1b-int4 --tokens 32,128 --threads "$threads" --loads 2 \
  --peer llama-cpp-python --peer onnxruntime-int4 --json "$out-1b.json" --markdown "$out-1b.md" --plot "$out-1b.png"

# The shipped guard beside every peer that is installed: latency and memory up to the longest text, start, energy; a new
# turn on a conversation of 400 tokens.
bench --tokens 16,32,64,128,256,512 --threads "$threads" --loads 2 --peers --turn 400 \
  --json "$out-mini.json" --markdown "$out-mini.md" --plot "$out-mini.png"

# One message of 64 tokens, now and then and without pause.
bench --tokens 64 --threads "$threads" --trials 200 --sustain 30 --no-limits \
  --json "$out-message.json" --markdown "$out-message.md"

# Throughput of classify_many against batch and threads.
for t in $(seq 1 "$threads"); do
  for batch in 1 4 16; do
    bench --tokens 64 --threads "$t" --batch "$batch" --loads 1 --no-limits --json "$out-batch$batch-threads$t.json"
  done
done
if [ -z "$dry" ]; then
  "$python" docs/bench/throughput.py "$out" "$out"-batch*-threads*.json
fi
