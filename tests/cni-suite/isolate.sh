#!/bin/sh
# Runs a command in the network and mount namespace that this script was started in, with folders of its own where plugins
# and tests keep files. What it mounts and writes ends with the namespace.
set -eu
mount --make-rprivate /
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /var/lib
mkdir /var/lib/etc
cp -a /etc/. /var/lib/etc
mount --bind /var/lib/etc /etc
mount -t tmpfs tmpfs /run
mkdir /run/netns /run/flannel /run/cni /run/tmp
export TMPDIR=/run/tmp
ip link set lo up
umask 0
exec "$@"
