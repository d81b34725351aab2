#!/bin/sh
# Installs those of the Debian packages it is given that are missing:
#   sh scripts/system.sh PACKAGE...
# As root, or with sudo where that asks for no password; else it fails and prints the command.
set -eu

missing=
for package in "$@"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: these Debian packages are needed, and there is no apt-get here:$missing" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "error: packages are missing; install them with: sudo apt-get install -y$missing" >&2
    exit 1
fi
$as_root apt-get update -q
$as_root apt-get install -y -q --no-install-recommends $missing
