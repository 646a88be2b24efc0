#!/bin/bash
# A SLURM of this machine alone, with accounting: slurm.sh start FOLDER, slurm.sh stop FOLDER. As root, with Debian's
# packages slurmctld, slurmd, slurmdbd, slurm-client, munge and mariadb-server. Then SLURM_CONF=FOLDER/slurm.conf.
set -e
folder=$2 host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf

stop() {
    for name in slurmctld slurmd slurmdbd mariadbd; do
        [ ! -s "$folder/$name.pid" ] || kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
    pkill -F "$folder/munged.pid" 2>/dev/null || true
}

start() {
    mkdir -p "$folder"/{state,spool,database} /run/munge
    chmod 755 "$folder"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
    mariadb-install-db --user=root --auth-root-authentication-method=normal --datadir="$folder/database" \
        >"$folder/mariadb.log" 2>&1
    mariadbd --user=root --datadir="$folder/database" --socket="$folder/mariadb.socket" \
        --bind-address=127.0.0.1 --port=16816 \
        --pid-file="$folder/mariadbd.pid" >>"$folder/mariadb.log" 2>&1 &
    for _ in $(seq 100); do [ -S "$folder/mariadb.socket" ] && break || sleep 0.2; done
    cat >"$folder/slurmdbd.conf" <<END
AuthType=auth/munge
DbdHost=localhost
DbdPort=16819
SlurmUser=root
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16816
StorageUser=root
END
    chmod 600 "$folder/slurmdbd.conf"
    cat >"$folder/slurm.conf" <<END
ClusterName=alone
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=16819
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    slurmdbd
    for _ in $(seq 50); do timeout 5 sacctmgr -i add cluster alone >/dev/null 2>&1 && break || sleep 0.3; done
    slurmctld
    slurmd
    for _ in $(seq 100); do timeout 5 sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0 || sleep 0.3; done
    echo "SLURM did not start: see the logs in $folder" >&2
    exit 1
}

"$1"
