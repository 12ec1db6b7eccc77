#!/bin/sh
# Take an extension away again: kata-extension-umount.sh NAME
set -u
place=/run/kata-extensions/$1
device=extension-$1

! mountpoint -q "$place" || umount "$place" || exit 1
[ ! -e "/dev/mapper/$device" ] || veritysetup close "$device"
