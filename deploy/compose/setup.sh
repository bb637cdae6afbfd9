#!/bin/sh
# Makes a SoftHSM token and a configuration for compose.yaml, unless they are there.
# The variables are for tests.
set -eu
umask 077

state="${STATE:-/var/lib/xkiproxy}"
module="${MODULE:-/usr/lib/softhsm/libsofthsm2.so}"

if [ -e "$state/conf/xkiproxy.toml" ]; then
    exit 0
fi
# What an earlier try left behind holds no key that anybody has used.
rm -rf "$state/conf" "$state/new" "$state/tokens" "$state/pin"
mkdir "$state/tokens"
random() {
    head -c 18 /dev/urandom | base64 | tr '+/' '-_'
}
random > "$state/pin"
# softhsm2-util takes PINs as arguments: this container has no other process, and ends with it.
softhsm2-util --init-token --free --label compose --so-pin "$(random)" --pin "$(cat "$state/pin")"
xkiproxy init "$state/new" --host localhost --host proxy \
    --kmi pkcs11 --module "$module" --token compose --pin-file "$state/pin"
rm "$state/pin"
# Prometheus is another container.
sed -i 's/^admin_listen = "127\.0\.0\.1:/admin_listen = "0.0.0.0:/' "$state/new/xkiproxy.toml"
mv "$state/new" "$state/conf"
