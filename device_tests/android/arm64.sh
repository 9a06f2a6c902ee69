#!/usr/bin/env bash
# Makes a folder with an ARM64 Python 3.11, onnxruntime, numpy and tokenizers that this x86-64 machine runs under
# qemu-user: real ARM kernels compute, an emulator executes them. Usage: arm64.sh FOLDER
# Needs a Debian or Ubuntu with qemu-user, pip and the network, no root. Afterwards: EDGEGUARD_ARM64=FOLDER.
set -euo pipefail
folder="${1:?usage: arm64.sh FOLDER}"
packages=(python3.11-minimal libpython3.11-stdlib libstdc++6 ca-certificates)
wheels=(onnxruntime==1.31.1 tokenizers==0.22.2 numpy==2.4.6)
mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
command -v qemu-aarch64 >/dev/null || { echo "qemu-aarch64 is not installed: apt-get install qemu-user" >&2; exit 1; }
[ ! -e "$folder" ] || { echo "$folder exists already" >&2; exit 1; }
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# An apt of its own, for arm64: the machine's packages are neither read nor changed.
mkdir -p "$scratch"/{lists/partial,archives/partial,etc}
: >"$scratch/status"
keyring="${DEBIAN_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}"
echo "deb [signed-by=$keyring] $mirror bookworm main" >"$scratch/etc/sources.list"
apt=(apt-get -qq -o "Dir::State=$scratch" -o "Dir::State::status=$scratch/status" -o "Dir::State::lists=$scratch/lists"
  -o "Dir::Cache=$scratch" -o "Dir::Etc::sourcelist=$scratch/etc/sources.list" -o Dir::Etc::sourceparts=-
  -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 -o APT::Sandbox::User=
  -o APT::Install-Recommends=false)
"${apt[@]}" update
"${apt[@]}" -y --download-only install "${packages[@]}"
mkdir "$scratch/system"
for package in "$scratch"/archives/*.deb; do dpkg-deb -x "$package" "$scratch/system"; done

"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$scratch/wheels" --only-binary=:all: \
  --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 "${wheels[@]}"
mkdir "$scratch/system/wheels"
for wheel in "$scratch"/wheels/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$scratch/system/wheels"; done

# A phone's core of 2018 and later: dot products, no i8mm. qemu-user shows the host's /proc/cpuinfo, in which
# onnxruntime finds no ARM core and crashes; a file below the root takes its place.
mkdir "$scratch/system/proc"
for processor in 0 1; do
  printf '%s\t: %s\n' processor "$processor" BogoMIPS 100.00 \
    Features 'fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp' \
    'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x4 'CPU part' 0xd0b 'CPU revision' 1
  echo
done >"$scratch/system/proc/cpuinfo"
cat >"$scratch/system/python" <<'PYTHON'
#!/usr/bin/env bash
root="$(cd "$(dirname "$0")" && pwd)"
exec qemu-aarch64 -cpu cortex-a76 -L "$root" -E PYTHONPATH="$root/wheels" -E PYTHONDONTWRITEBYTECODE=1 \
  "$root/usr/bin/python3.11" "$@"
PYTHON
chmod +x "$scratch/system/python"
for module in numpy tokenizers onnxruntime; do "$scratch/system/python" -c "import $module"; done
mkdir -p "$(dirname "$folder")"
mv "$scratch/system" "$folder"
