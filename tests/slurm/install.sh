#!/bin/sh
# Makes sure that this machine has what tests/slurm needs; installs it where apt and the right to use it are there.
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
  echo "tests/slurm needs commands that are not here: $(missing)" >&2
  echo "This machine has no apt-get; Debian and Ubuntu have them in the packages $packages." >&2
  exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
  as_root=""
elif sudo -n true 2>/dev/null; then
  as_root="sudo"
else
  echo "tests/slurm needs commands that are not here: $(missing)" >&2
  echo "Install them as root: apt-get install $packages" >&2
  exit 1
fi

echo "installing $packages"
# The packages would start daemons of their own, which the tests have no use for.
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
