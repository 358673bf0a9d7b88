#!/bin/sh
# Installs the packages that tests/slurm needs, if commands are missing, with apt as root or by sudo.
set -eu

PATH=$PATH:/usr/sbin:/sbin
packages="slurm-wlm munge shellcheck"

missing() {
  for command in munged slurmctld slurmd sbatch srun scontrol squeue sinfo scancel shellcheck; do
    command -v "$command" >/dev/null || printf '%s ' "$command"
  done
}

[ -n "$(missing)" ] || exit 0
if ! command -v apt-get >/dev/null; then
  echo "tests/slurm needs commands that are not installed: $(missing)" >&2
  echo "This machine has no apt-get; on Debian and Ubuntu they are in the packages $packages." >&2
  exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
  as_root=""
elif sudo -n true 2>/dev/null; then
  as_root="sudo"
else
  echo "tests/slurm needs commands that are not installed: $(missing)" >&2
  echo "Install them as root: apt-get install $packages" >&2
  exit 1
fi

echo "installing $packages"
# Keeps the packages from starting their daemons, which the tests do not use.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
  $as_root chmod 755 "$policy"
  trap '$as_root rm -f "$policy"' EXIT
fi
$as_root apt-get update -qq
# shellcheck disable=SC2086  # several words
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends $packages
if [ -n "$(missing)" ]; then
  echo "still missing: $(missing)" >&2
  exit 1
fi
