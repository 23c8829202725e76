#!/usr/bin/env bash
# Answer from a bundle on an emulated AArch64 device: tools/test-edge.sh BUNDLE [PROMPTS.jsonl]
#
# A Debian system for AArch64 is unpacked into build/edge/root and run by QEMU, without a network. It gets Python, the wheel of
# tools/build-wheels.sh aarch64 with what it requires, and a copy of BUNDLE. Without FAISS, then with it, it answers
# the prompts, and a server in it a request; each answer is compared with this machine's. Later runs use the system again.
#
# Needs root, Linux 6.7 (where a user namespace has its own table of emulators, so that nothing of the machine is changed and mounts
# end with the script), Debian's packages mmdebstrap and qemu-user-static, ip and curl, and a Python that has coreinfer (PYTHON).
# CPU names QEMU's model: cortex-a76 is a Raspberry Pi 5, cortex-a72 a Raspberry Pi 4, which has no dot products. SUITE
# must be Debian's with the wheel's Python, and among the sources of apt here.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$source/.venv/bin/python}
SUITE=${SUITE:-bookworm}
QEMU_CPU=${CPU:-cortex-a76}
wheels=$source/build/wheels
edge=$source/build/edge
root=$edge/root
port=8000

refuse() { echo "error: $1" >&2; exit 2; }
say() { printf '\n== %s\n' "$1"; }

check() { # bundle, prompts
  [ "$(id -u)" = 0 ] || refuse "unpacking a system with its owners needs root; run this as root"
  local tool
  for tool in mmdebstrap qemu-aarch64-static unshare ip curl; do
    command -v "$tool" >/dev/null || refuse "no program $tool; apt-get install mmdebstrap qemu-user-static util-linux iproute2 curl"
  done
  [ -f "$1/manifest.json" ] || refuse "BUNDLE: expected a folder with manifest.json, got '$1'"
  [ -f "$2" ] || refuse "PROMPTS: expected a file of JSON Lines, got '$2'"
  "$PYTHON" -c 'import coreinfer.runtime' || refuse "$PYTHON does not have coreinfer; set PYTHON"
  [ "$(ls "$wheels"/*-manylinux*_aarch64.whl 2>/dev/null | wc -l)" = 1 ] ||
    refuse "expected one wheel build/wheels/*-manylinux*_aarch64.whl; run tools/build-wheels.sh aarch64"
  unshare --user --map-root-user --mount mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc ||
    refuse "binfmt_misc cannot be mounted in a user namespace; this needs Linux 6.7 and the module binfmt_misc, here is $(uname -r)"
}

# Nothing of it is run while it is unpacked, which takes seconds instead of minutes. numpy's wheel needs libstdc++.
unpack_system() {
  [ ! -e "$edge/$SUITE" ] || return 0
  rm -rf "$root"
  apt-get indextargets --format 'deb [arch=arm64] $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' \
    "Codename: $SUITE" >"$edge/sources"
  [ -s "$edge/sources" ] || refuse "SUITE: expected one that apt has here, got '$SUITE'"
  mmdebstrap --quiet --mode=root --variant=extract --arch=arm64 --include='?essential' --include=python3,libstdc++6 \
    "$SUITE" "$root" - <"$edge/sources"
  touch "$edge/$SUITE"
}

# By this machine's pip, for the device's platform: an emulated one takes minutes.
install() { # folder of the device, extras
  local version minor platforms=manylinux2014_aarch64
  version=$(basename "$(readlink "$root/usr/bin/python3")")
  for minor in $(seq 17 36); do platforms="$platforms manylinux_2_${minor}_aarch64"; done
  rm -rf "${root:?}/$1"
  # shellcheck disable=SC2046,SC2086
  "$PYTHON" -m pip --disable-pip-version-check install --quiet --only-binary=:all: --implementation cp --no-compile \
    --python-version "${version#python}" $(printf -- '--platform %s ' $platforms) --target "$root/$1" \
    "$(ls "$wheels"/*-manylinux*_aarch64.whl)$2"
  du -sm "$root/$1"
}

answer_here() {
  rm -f "$edge/expected.jsonl"
  "$PYTHON" -c 'from coreinfer.runtime.commands.run import main; main()' "$root/bundle" --batch "$root/prompts.jsonl" \
    -o "$edge/expected.jsonl" -n "$tokens" --temperature 0 --threads "$threads"
}

device() { # folder of packages, program, arguments
  local packages=$1
  shift
  chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin LANG=C.UTF-8 QEMU_CPU="$QEMU_CPU" PYTHONPATH="/$packages" "$@"
}

mount_device() {
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  # The start of an AArch64 program's file; F opens the emulator now, because the device does not have it.
  printf '%s' ':aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$(command -v qemu-aarch64-static):F" \
    >/proc/sys/fs/binfmt_misc/register
  mount --rbind /dev "$root/dev"
  mount -t proc proc "$root/proc"
  ip link set lo up
}

answer() { # folder of packages
  say "coreinfer-run, $1"
  rm -f "$root/answers.jsonl"
  device "$1" python3 "/$1/bin/coreinfer-run" /bundle --batch /prompts.jsonl -o /answers.jsonl -n "$tokens" --temperature 0 \
    --threads "$threads"
  "$PYTHON" "$source/tools/compare_answers.py" "$edge/expected.jsonl" "$root/answers.jsonl"
}

serve() {
  say "coreinfer-serve"
  device with-faiss python3 /with-faiss/bin/coreinfer-serve /bundle --port $port &
  local server=$! attempt
  for attempt in $(seq 600); do
    ! curl -s -o /dev/null "127.0.0.1:$port/health" || break
    kill -0 $server 2>/dev/null || refuse "the server ended before it answered"
    sleep 1
  done
  curl -sS --fail-with-body "127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "bundle", "messages": [{"role": "user", "content": "What is a fjord?"}], "temperature": 0, "max_tokens": 16}' \
    | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])'
  kill $server
  wait $server || [ $? = 143 ]  # ended by the signal
}

in_the_device() {
  mount_device
  say "$(device without-faiss uname -m), $(device without-faiss python3 --version), QEMU's $QEMU_CPU"
  device without-faiss python3 -c 'from coreinfer.runtime.engines.native import _native as native
names = native.available_isas()
print("kernels:", names[0], "(with dot products)" if names[0] == "neon" else "(no dot products)", "of", *names)'
  answer without-faiss
  answer with-faiss
  serve
}

tokens=${TOKENS:-32}
# The same on both sides: a softmax is summed in as many parts as there are threads.
threads=${THREADS:-2}
if [ "${1:-}" = --in-the-device ]; then
  in_the_device
  exit
fi
[ $# -ge 1 ] || refuse "BUNDLE: expected a folder; usage: tools/test-edge.sh BUNDLE [PROMPTS.jsonl]"
prompts=${2:-$source/tools/edge_prompts.jsonl}
check "$1" "$prompts"
mkdir -p "$edge"
unpack_system
install without-faiss ''
install with-faiss '[faiss,serve]'
rm -rf "$root/bundle"
cp -rL "$1" "$root/bundle"
cp "$prompts" "$root/prompts.jsonl"
answer_here
# Mounts and processes end with these namespaces. The network is one of their own, with nobody in it.
unshare --user --map-root-user --mount --net --pid --fork --kill-child --mount-proc bash "$0" --in-the-device
