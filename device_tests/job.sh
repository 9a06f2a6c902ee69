# What every run.sh EXPORT JOB begins with, sourced once `target` is set (an array, where the driver gets options too). Sets
# root, python, export_folder and job. Without arguments the driver makes export and job, and calls run.sh again.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
if [ $# -eq 0 ]; then cd "$root" && exec "$python" -m device_tests run "${target[@]}"; fi
export_folder="$(cd "$1" && pwd)" job="$(cd "$2" && pwd)"

# plan NAME: what the plan says of it, empty for null.
plan() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]] or "")' "$job/plan.json" "$1"; }

# answer SCRIPT: a file of answers beside every file of rows that the job asks.
answer() {
  local asked
  for asked in "$job"/*.jsonl; do
    # Exit code 2 says that a line is wrong: the driver names it.
    "$python" "$export_folder/$1" "$asked" >"$asked.answers" || [ $? -eq 2 ]
  done
}
