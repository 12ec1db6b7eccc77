#!/bin/sh
# merge_config.sh -n -O DIRECTORY FRAGMENT...: the fragments on a configuration without anything.
set -e
[ "$1 $2" = "-n -O" ] || { echo "the toy knows -n -O alone" >&2; exit 1; }
out="$3"
shift 3
[ "$ARCH" = x86_64 ] || { echo "no ARCH" >&2; exit 1; }
cat "$@" > "$out/.config"
srctree="${0%/scripts/kconfig/merge_config.sh}" sh "${0%/*}/conf" "$out/.config"
