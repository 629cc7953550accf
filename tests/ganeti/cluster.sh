#!/usr/bin/env bash
# Brings up a real Ganeti on this machine, for the tests, or takes it away again. Idempotent.
#
#   cluster.sh up      with two hypervisors: one that is played, and KVM, which boots guests, in software
#   cluster.sh down
#   cluster.sh env     prints what the tests need, as lines of `export`
#
# Ends with 77 where a real Ganeti cannot be had on this machine.
#
# It is Ganeti's own "virtual cluster" mode (GANETI_ROOTDIR, GANETI_HOSTNAME): /etc/ganeti and /var/lib/ganeti stay untouched. The
# addresses of node and cluster live on the loopback of a network namespace of their own, since Ganeti refuses a node whose name is
# of 127/8; only the RAPI runs out here, on 127.0.0.1, and reaches the rest through unix sockets.
#
# Guests have a bridge in that namespace; whoever serves them media listens on MEDIA_ADDRESS, at the other end of a pair of
# interfaces.
#
# Needs Debian or Ubuntu with their Ganeti 3, and root with the right to make network namespaces. Needs no systemd, DNS, ssh, LVM.
set -euo pipefail

BASE=${GANETI_TEST_BASE:-/tmp/ogt}              # short: sockets of QEMU have to fit into 107 bytes
NAMESPACE=${GANETI_TEST_NAMESPACE:-ogt}
PORT=${GANETI_TEST_PORT:-15080}
NODE=n1.gt
CLUSTER=cluster.gt
# RFC 2544's range, and never seen outside of the namespace.
NODE_ADDRESS=198.18.77.10
CLUSTER_ADDRESS=198.18.77.1
# Where the guests' bridge is reached from here, and the bridge.
MEDIA_ADDRESS=198.19.0.1
BRIDGE_ADDRESS=198.19.0.2
MEDIA=$NAMESPACE-media
ROOT=$BASE/$NODE
URL=https://127.0.0.1:$PORT
# Of a cluster that lives as long as a test and listens on loopback.
RAPI_USER=omni
RAPI_PASSWORD=omni-secret
OS_FOLDER=/srv/ganeti/os                        # the one path that is not relocated

say() { echo "ganeti: $*" >&2; }
cannot() { say "cannot test with a real Ganeti here: $*"; exit 77; }
fail() { say "$*"; exit 1; }
api() { curl --silent --show-error --insecure --max-time 30 --user "$RAPI_USER:$RAPI_PASSWORD" "$@"; }
send() { api --request "$1" --header 'Content-Type: application/json' --data "$3" "$URL$2"; }
inside() { ip netns exec "$NAMESPACE" env GANETI_ROOTDIR="$ROOT" GANETI_HOSTNAME="$NODE" "$@"; }

is_healthy() {
    [ -e "$BASE/is-up" ] && [ -e "/run/netns/$NAMESPACE" ] &&
        api --max-time 5 "$URL/2/info" 2>/dev/null | grep -q "\"name\": \"$CLUSTER\"" &&
        api --max-time 8 "$URL/2/os" 2>/dev/null | grep -q '"omni-broken"'    # master, a job and the node daemon work
}

install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get > /dev/null || cannot "there is no apt-get to install ${missing[*]} with"
    say "installing ${missing[*]}"
    # Package scripts must not start daemons.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    { apt-get update --quiet --quiet &&
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}"; } \
        > /dev/null || cannot "apt-get could not install ${missing[*]}"
}

# Waits for a job that a call returned.
job() {
    local status
    for _ in $(seq 1 150); do
        status=$(api "$URL/2/jobs/$1" | sed -n 's/.*"status": "\([a-z]*\)".*/\1/p')
        case $status in
        success) return 0 ;;
        error | canceled) fail "job $1 of its set-up: $(api "$URL/2/jobs/$1" | tail --bytes=500)" ;;
        esac
        sleep 0.2
    done
    fail "job $1 of its set-up does not end"
}

up() {
    local operating_system network
    [ "$(id --user)" = 0 ] || cannot "it needs root"
    if is_healthy; then return 0; fi
    # block-extra: a CD by URL. The last line is for the guest.
    install_packages ganeti ganeti-os-noop curl openssl iproute2 openssh-client qemu-system-x86 qemu-block-extra \
        busybox-static isolinux syslinux-common xorriso cpio xz-utils zstd
    # Read by `gnt-cluster init`, and never used.
    [ -f /etc/ssh/ssh_host_rsa_key.pub ] || ssh-keygen -q -t rsa -N '' -f /etc/ssh/ssh_host_rsa_key

    down
    if (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then fail "port $PORT is taken: set GANETI_TEST_PORT"; fi
    ip netns add "$NAMESPACE" || cannot "network namespaces are not allowed here"
    mkdir -p "/etc/netns/$NAMESPACE"            # `ip netns exec` lays these over /etc
    printf '127.0.0.1 localhost\n%s %s\n%s %s\n' "$CLUSTER_ADDRESS" "$CLUSTER" "$NODE_ADDRESS" "$NODE" \
        > "/etc/netns/$NAMESPACE/hosts"
    : > "/etc/netns/$NAMESPACE/resolv.conf"     # no DNS: look-ups of names fail at once
    ip -n "$NAMESPACE" link set lo up
    ip -n "$NAMESPACE" addr add "$NODE_ADDRESS/32" dev lo
    # Guests, the node, and whoever serves them media meet here.
    { ip -n "$NAMESPACE" link add br0 type bridge && ip link add "$MEDIA" type veth peer name media netns "$NAMESPACE"; } ||
        cannot "bridges and pairs of interfaces are not allowed here"
    ip -n "$NAMESPACE" addr add "$BRIDGE_ADDRESS/16" dev br0
    ip -n "$NAMESPACE" link set br0 up
    ip -n "$NAMESPACE" link set media master br0 up
    ip addr add "$MEDIA_ADDRESS/16" dev "$MEDIA"
    ip link set "$MEDIA" up

    mkdir -p "$ROOT"/etc/{default,ganeti} "$ROOT"/var/lock "$ROOT"/var/{lib,log,run}/ganeti "$BASE"/{file,shared}
    chmod 755 "$BASE" "$ROOT"
    printf '%s\n' "$BASE/file" "$BASE/shared" > "$ROOT/etc/ganeti/file-storage-paths"
    cat > "$ROOT/etc/default/ganeti" << END
NODED_ARGS='--no-mlock -b $NODE_ADDRESS'
CONFD_ARGS='-b $NODE_ADDRESS'
RAPI_ARGS='-b 127.0.0.1 -p $PORT --require-authentication'
export GANETI_ROOTDIR='$ROOT' GANETI_HOSTNAME='$NODE'
END
    env GANETI_ROOTDIR="$ROOT" GANETI_HOSTNAME="$NODE" /usr/lib/ganeti/ensure-dirs
    printf '%s {cleartext}%s write\nreader {cleartext}reader-secret read\n' "$RAPI_USER" "$RAPI_PASSWORD" \
        > "$ROOT/var/lib/ganeti/rapi/users"
    chown gnt-rapi:gnt-masterd "$ROOT/var/lib/ganeti/rapi/users"
    chmod 640 "$ROOT/var/lib/ganeti/rapi/users"

    # An OS whose installation takes its time, and one whose installation fails.
    for operating_system in omni-slow omni-broken; do
        mkdir -p "$OS_FOLDER"
        rm -rf "${OS_FOLDER:?}/$operating_system"
        cp -r /usr/share/ganeti/os/noop "$OS_FOLDER/$operating_system"
    done
    printf '#!/bin/sh\nsleep 3\n' > "$OS_FOLDER/omni-slow/create"
    printf '#!/bin/sh\necho boom >&2\nexit 3\n' > "$OS_FOLDER/omni-broken/create"

    say "starting a cluster"
    inside gnt-cluster init --no-etc-hosts --no-ssh-init --master-netdev=lo --master-netmask=32 \
        --enabled-hypervisors=fake,kvm --hypervisor-parameters \
        "kvm:kvm_path=/usr/bin/qemu-system-x86_64,kernel_path=,kvm_flag=,vhost_net=false" \
        --enabled-disk-templates=file,sharedfile,diskless \
        --file-storage-dir="$BASE/file" --shared-file-storage-dir="$BASE/shared" \
        --nic-parameters=mode=bridged,link=br0 \
        --ipolicy-bounds-specs=min:disk-size=1,cpu-count=1,disk-count=0,memory-size=1,nic-count=0,spindle-use=0/max:disk-size=1048576,cpu-count=64,disk-count=16,memory-size=1048576,nic-count=8,spindle-use=64 \
        --ipolicy-vcpu-ratio=1000 --ipolicy-spindle-ratio=100000 "$CLUSTER" >&2
    inside /usr/lib/ganeti/daemon-util stop ganeti-rapi
    env GANETI_ROOTDIR="$ROOT" GANETI_HOSTNAME="$NODE" /usr/lib/ganeti/daemon-util start ganeti-rapi
    for _ in $(seq 1 100); do
        if api "$URL/version" > /dev/null 2>&1; then break; fi
        sleep 0.2
    done

    # A single node can lose none, so hail would refuse everything; a flag without a value is JSON's null, which only RAPI takes.
    job "$(send PUT /2/modify '{"default_iallocator_params":{"no-capacity-checks":null}}')"
    # An address pool, one that is full with the first instance, and a node group without nodes.
    job "$(send POST /2/networks '{"network_name":"net1","network":"198.18.80.0/22","gateway":"198.18.80.1"}')"
    job "$(send POST /2/networks '{"network_name":"tiny","network":"198.18.90.0/30","gateway":"198.18.90.1"}')"
    job "$(send POST /2/groups '{"group_name":"spare"}')"
    for network in net1 tiny; do
        job "$(send PUT "/2/networks/$network/connect" \
            '{"group_name":"default","network_mode":"bridged","network_link":"br0"}')"
    done

    openssl x509 -in "$ROOT/var/lib/ganeti/rapi.pem" -out "$BASE/rapi.pem"
    cat > "$BASE/gnt" << END
#!/bin/sh
# Ganeti's own command line, on this cluster: gnt gnt-instance list
exec ip netns exec $NAMESPACE env GANETI_ROOTDIR=$ROOT GANETI_HOSTNAME=$NODE "\$@"
END
    chmod 755 "$BASE/gnt"
    "$(dirname "$0")/guest.sh" "$BASE/guest.iso"
    touch "$BASE/is-up"
    is_healthy || fail "the cluster came up and does not work; its logs are in $ROOT/var/log/ganeti"
}

# What a process was given, a line each; nothing where it is gone.
words() { { tr '\0' '\n' < "/proc/$1/$2"; } 2>/dev/null || true; }

# Whether a process is of our cluster.
is_ours() {
    words "$1" environ | grep -qxF "GANETI_ROOTDIR=$ROOT" || words "$1" cmdline | grep -qF "$ROOT/"
}

down() {
    local process file
    # The daemons that would start others first.
    for file in "$ROOT"/var/run/ganeti/ganeti-{luxid,rapi,wconfd,kvmd,mond,metad,confd,noded}.pid \
        "$ROOT"/var/run/ganeti/kvm-hypervisor/pid/*; do
        process=$(cat "$file" 2>/dev/null) || continue
        if [ -n "$process" ] && is_ours "$process"; then kill -KILL "$process" 2>/dev/null || true; fi
    done
    # Jobs, and what a daemon left behind: our root folder in their environment, and a program of Ganeti's.
    for file in /proc/[0-9]*; do
        process=${file#/proc/}
        words "$process" cmdline | head --lines=2 |
            grep -qE '^(/usr/sbin/ganeti-|/usr/share/ganeti/|/usr/lib/ganeti/|/usr/bin/qemu-system-)' || continue
        if is_ours "$process"; then kill -KILL "$process" 2>/dev/null || true; fi
    done
    ip link del "$MEDIA" 2>/dev/null || true
    ip netns del "$NAMESPACE" 2>/dev/null || true
    rm -rf "/etc/netns/$NAMESPACE" "$OS_FOLDER"/omni-{slow,broken}
    rmdir /etc/netns "$OS_FOLDER" /srv/ganeti 2>/dev/null || true
    rm -rf "${ROOT:?}" "${BASE:?}"/{file,shared,gnt,guest.iso,is-up,rapi.pem}
    rmdir "$BASE" 2>/dev/null || true
}

print_env() {
    cat << END
export GANETI_TEST_ENDPOINT=$URL
export GANETI_TEST_USER=$RAPI_USER
export GANETI_TEST_PASSWORD=$RAPI_PASSWORD
export GANETI_TEST_SHA256=$(openssl x509 -in "$BASE/rapi.pem" -noout -fingerprint -sha256 | sed 's/.*=//')
export GANETI_TEST_GNT=$BASE/gnt
export GANETI_TEST_BASE=$BASE
export GANETI_TEST_MEDIA_ADDRESS=$MEDIA_ADDRESS
END
}

case ${1:-} in
up) up ;;
down) down ;;
env) print_env ;;
*)
    sed -n '2,9p' "$0" >&2
    exit 2
    ;;
esac
