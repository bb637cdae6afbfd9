#!/bin/sh
# Installs the Debian packages that the tests use, where they are missing; with the argument `deb` only
# those that `make deb` uses.
set -eu

missing=""
need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need_file() { # need_file PACKAGE PLACE...: the file is in one of these places
    package="$1"
    shift
    for place in "$@"; do
        [ ! -e "$place" ] || return 0
    done
    missing="$missing $package"
}
need openssl openssl
need curl curl
need softhsm2-util softhsm2
need_file softhsm2 /usr/lib/softhsm/libsofthsm2.so
need pkcs11-tool opensc
need certutil libnss3-tools
need_file libnss3 /usr/lib/*/libsoftokn3.so
need gcc gcc
need_file libc6-dev /usr/include/stdio.h
need valgrind valgrind
[ -x /usr/sbin/rsyslogd ] || need rsyslogd rsyslog
[ -x /usr/sbin/haproxy ] || need haproxy haproxy
need promtool prometheus
need_file rsyslog-openssl /usr/lib/*/rsyslog/lmnsd_ossl.so
need systemd-analyze systemd
need chromium chromium
need_file libseccomp2 /usr/lib/*/libseccomp.so.2 /lib/*/libseccomp.so.2
need mmdebstrap mmdebstrap
need systemd-nspawn systemd-container
need lintian lintian
need buildah buildah
[ "${1:-}" != deb ] || missing=""
need dh debhelper
need dpkg-buildpackage dpkg-dev
need_file python3-venv /usr/lib/python3.*/ensurepip

[ -n "$missing" ] || exit 0
sudo=""
[ "$(id -u)" = 0 ] || sudo="sudo"
echo "installing:$missing"
$sudo apt-get update -qq
# shellcheck disable=SC2086 # a list of packages
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
