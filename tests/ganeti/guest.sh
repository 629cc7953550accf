#!/usr/bin/env bash
# Makes a small bootable image for the tests on KVM: a CD that is a disk as well. It holds Debian's kernel, and a busybox that
# tells on the serial console what a Talos would read: the UUID and the serial number that the firmware shows, the kernel's
# arguments, and the files behind the address in that serial number.
#
#   guest.sh IMAGE
#
# In place of a row of `@` in the image a test writes kernel arguments. Needs Debian or Ubuntu, and root to install packages.
set -euo pipefail

IMAGE=$(realpath "$1")
# Shorter than what a kernel reads, with ours.
ROOM=1700
# Small, for guests of clouds; by the names of Debian and of Ubuntu.
KERNELS=(linux-image-cloud-amd64 linux-image-amd64 linux-image-virtual)

# Of its network interface, in the order to load them.
MODULES=(failover net_failover virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_net)

say() { echo "guest: $*" >&2; }

fetch() {
    local kernel package
    for kernel in "${KERNELS[@]}"; do
        package=$(apt-cache depends "$kernel" 2> /dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head --lines=1)
        if [ -n "$package" ]; then break; fi
    done
    [ -n "${package:-}" ] || { say "this system has none of ${KERNELS[*]}"; exit 77; }
    say "fetching $package"
    # Not installed: it would want to be this machine's.
    apt-get download --quiet --quiet "$package" 2> /dev/null || { say "apt-get could not fetch $package"; exit 77; }
    dpkg-deb --extract ./linux-image-*.deb kernel
    apt-get download --quiet --quiet "${package/-image-/-modules-}" 2> /dev/null && dpkg-deb --extract ./linux-modules-*.deb kernel
    return 0
}

FOLDER=$(mktemp --directory)
trap 'rm -rf "$FOLDER"' EXIT
chmod 755 "$FOLDER"                             # apt-get fetches as a user of its own
cd "$FOLDER"
fetch

mkdir -p root/{bin,dev,proc,sys,tmp,lib} cd/isolinux
cp /bin/busybox root/bin/busybox
for module in "${MODULES[@]}"; do
    # What is not there is part of the kernel.
    file=$(find kernel -name "$module.ko*" | head --lines=1)
    case $file in
    *.xz) xz --decompress --stdout "$file" > "root/lib/$module.ko" ;;
    *.zst) zstd --decompress --quiet --stdout "$file" > "root/lib/$module.ko" ;;
    *.ko) cp "$file" "root/lib/$module.ko" ;;
    esac
done
printf '%s\n' "${MODULES[@]}" > root/lib/order
cat > root/init << 'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev
exec > /dev/ttyS0 2>&1 < /dev/null
while read -r module; do
    [ -f /lib/$module.ko ] && insmod /lib/$module.ko
done < /lib/order
# There is no DHCP: the address follows from the MAC. The third number is odd, and so nobody else's.
mac=$(cat /sys/class/net/eth0/address)
fifth=$(echo "$mac" | cut -d : -f 5) sixth=$(echo "$mac" | cut -d : -f 6)
ip link set eth0 up
ip addr add "198.19.$(((0x$fifth) | 1)).$(((0x$sixth) % 254 + 1))/16" dev eth0
serial=$(cat /sys/class/dmi/id/product_serial)
url=${serial#ds=nocloud-net;s=}
server=${url#http://}
path=/${server#*/}
server=${server%%/*}
# In the order of Talos.
tell() {
    # It stays on the line: some servers answer nobody who has hung up.
    { printf 'GET %s HTTP/1.0\r\nHost: %s\r\n\r\n' "$path$1" "$server" && sleep 2; } |
        nc -w 5 "${server%:*}" "${server#*:}" | tr -d '\r' > /tmp/answer
    echo "guest: $1: status $(head -n 1 /tmp/answer)"
    sed "1,/^\$/d; s/^/guest: $1: /" /tmp/answer
}
while :; do
    echo "guest: uuid $(cat /sys/class/dmi/id/product_uuid)"
    echo "guest: serial $serial"
    echo "guest: arguments $(cat /proc/cmdline)"
    if [ "$url" != "$serial" ]; then
        tell meta-data
        tell network-config
        tell user-data
    fi
    echo "guest: end"
    sleep 2
done
END
chmod 755 root/init
(cd root && find . | cpio --quiet --create --format=newc | gzip -1) > cd/isolinux/initrd
cp kernel/boot/vmlinuz-* cd/isolinux/vmlinuz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 cd/isolinux/
printf 'DEFAULT guest\nLABEL guest\nKERNEL vmlinuz\nINITRD initrd\nAPPEND quiet %s\n' \
    "$(printf '@%.0s' $(seq $ROOM))" > cd/isolinux/isolinux.cfg
xorriso -as mkisofs -quiet -V GUEST -o guest.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
    -boot-load-size 4 -boot-info-table -isohybrid-mbr /usr/lib/ISOLINUX/isohdpfx.bin cd
mv guest.iso "$IMAGE"
