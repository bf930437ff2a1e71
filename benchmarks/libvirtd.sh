#!/usr/bin/env bash
# Run libvirtd with nothing of the machine's own libvirt, and leave nothing behind: in a mount and UTS namespace that end
# with it. Its settings are Debian's defaults but for what is said below.
#
#   libvirtd.sh TREE FOLDER NAME ADDRESS MIGRATION-ADDRESS UUID
#
# TREE is where the packages are unpacked, FOLDER (empty but for a file "hosts" and a folder "images") its own place in the file system.
set -euo pipefail
tree=$1 folder=$2 name=$3 address=$4 migration_address=$5 uuid=$6

hostname "$name"

# Names are resolved from a file: there is no name server in the lab, and waiting for one would be libvirt's fault no more
# than ours.
echo "hosts: files" >"$folder/nsswitch.conf"
# Debian's package makes this user when it is installed.
cp /etc/passwd /etc/group "$folder"
if ! id libvirt-qemu >/dev/null 2>&1; then
    echo "libvirt-qemu:x:64055:64055:Libvirt Qemu:/var/lib/libvirt:/usr/sbin/nologin" >>"$folder/passwd"
    echo "libvirt-qemu:x:64055:" >>"$folder/group"
fi
for file in hosts nsswitch.conf passwd group; do mount --bind "$folder/$file" "/etc/$file"; done

# Devices without /dev/kvm: all systems are compared in emulation, and where KVM is there but runs no guest (as in a
# virtual machine) libvirt would ask QEMU anew for its capabilities in each migration, which takes half a minute.
mkdir "$folder/dev"
mount -t tmpfs -o mode=755 tmpfs "$folder/dev"
for device in null zero full random urandom tty ptmx; do
    touch "$folder/dev/$device"
    mount --bind "/dev/$device" "$folder/dev/$device"
done
for devices in pts shm net; do
    mkdir "$folder/dev/$devices"
    mount --bind "/dev/$devices" "$folder/dev/$devices"
done
mount --move "$folder/dev" /dev

# The cache is about to go out of sight.
mkdir "$folder/libvirt"
mount --bind "$tree" "$folder/libvirt"
for place in /run /etc/libvirt /var/lib /var/cache /var/log; do mount -t tmpfs tmpfs "$place"; done
mkdir -p /run/libvirt /var/lib/libvirt/images /var/cache/libvirt /var/log/libvirt/qemu
mount --bind "$folder/images" /var/lib/libvirt/images

cat >/etc/libvirt/libvirtd.conf <<EOF
listen_tls = 0
listen_tcp = 1
listen_addr = "$address"
auth_tcp = "none"
host_uuid = "$uuid"
EOF
cat >/etc/libvirt/qemu.conf <<EOF
migration_host = "$migration_address"
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
EOF
export LIBVIRT_DRIVER_DIR
LIBVIRT_DRIVER_DIR=$(echo "$folder"/libvirt/usr/lib/*/libvirt/connection-driver)
exec "$folder/libvirt/usr/sbin/libvirtd" --listen
