#!/usr/bin/env bash
# The entry point of a node: an sshd that lets in the key which all nodes share through the folder /keys.
set -euo pipefail

mkdir -p /keys /root/.ssh /run/sshd
exec {lock}>/keys/.lock
flock "$lock" # the first node makes the key, the others find it
[[ -s /keys/id_ed25519 ]] || ssh-keygen -q -t ed25519 -N '' -C dstune -f /keys/id_ed25519
flock -u "$lock"
install -m 600 /keys/id_ed25519 /root/.ssh/id_ed25519
install -m 600 /keys/id_ed25519.pub /root/.ssh/authorized_keys
printf 'Host *\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n' >/root/.ssh/config

# A login by ssh shall find the same programs and caches as this container. Values are quoted: bash reads this file.
(
  umask 077
  while IFS= read -r -d '' entry; do
    [[ $entry =~ ^(PATH|VIRTUAL_ENV|(DS|DSTUNE|HF|TORCH|CUDA|NCCL)_[A-Za-z0-9_]*)= ]] || continue
    printf 'export %s=%q\n' "${entry%%=*}" "${entry#*=}"
  done < <(env -0) >/root/.bashrc
)
ssh-keygen -A >/dev/null
exec /usr/sbin/sshd -D -e -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password
