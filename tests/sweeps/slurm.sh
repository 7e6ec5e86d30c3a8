#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests/test_clusters.py: `tests/slurm.sh start DIR` and `tests/slurm.sh stop DIR`.
# Everything but the munge key and daemon is in DIR. Needs Debian's slurm-wlm and munge, and root. Exit status 3, with
# the reason on standard output, where it cannot be had here.
set -eu
action=$1 dir=$(realpath -m "$2")
cannot() { echo "$1"; exit 3; }
export SLURM_CONF="$dir/slurm.conf"

start() {
  for program in slurmctld slurmd sbatch squeue munged; do
    command -v $program >/dev/null || PATH=$PATH:/usr/sbin command -v $program >/dev/null || cannot "no $program here"
  done
  [ "$(id -u)" = 0 ] || cannot "a slurmd of its own needs root"
  host=$(hostname -s)
  mkdir -p "$dir/state" "$dir/spool" /run/munge
  chown munge /run/munge
  [ -s /etc/munge/munge.key ] || cannot "munge has no key"
  munge --no-input >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
  cat > "$SLURM_CONF" <<CONF
ClusterName=mopo
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ReturnToService=2
MinJobAge=300
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=3000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  PATH=$PATH:/usr/sbin
  slurmctld
  slurmd
  for _ in $(seq 60); do
    sinfo --noheader --states=idle --format=%n 2>/dev/null | grep -q . && exit 0
    sleep 0.5
  done
  cannot "its node did not come up: $(tail -n 1 "$dir/slurmd.log")"
}

stop() {
  for daemon in slurmd slurmctld; do
    [ ! -f "$dir/$daemon.pid" ] || kill "$(cat "$dir/$daemon.pid")"
  done
}

$action
