#!/usr/bin/env bash
# Runs the test program of the native kernels (csrc/tests) on an emulated CPU with AVX-512 VNNI, for machines without: Bochs
# boots Debian's kernel with the program as the only thing in its file system. Takes the number of cases per operation.
#
#     tools/avx512.sh [60]      (Debian: apt-get install bochs bochsbios vgabios isolinux syslinux-common xorriso cpio)
set -euo pipefail
cd "$(dirname "$0")/.."
cases=${1:-60} cmake=${CMAKE:-cmake} work=build/avx512
mkdir -p $work/root/dev $work/iso/isolinux

"$cmake" -S . -B $work -DBITWRIGHT_SELF_TEST=ON >/dev/null
"$cmake" --build $work -j 2
cc -DCASES="\"$cases\"" -o $work/root/init csrc/tests/boot.c
cp $work/self_test $work/root/
ldd $work/self_test | grep -o "/[^ ]*" | while read -r library; do install -D "$library" "$work/root$library"; done
test -e $work/root/dev/console || mknod $work/root/dev/console c 5 1
(cd $work/root && find . | cpio -o -H newc --quiet) | gzip -1 >$work/iso/initrd

if ! test -e $work/iso/vmlinuz; then
  (cd $work && apt-get download "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p')")
  dpkg -x $work/linux-image-*.deb $work/kernel
  cp $work/kernel/boot/vmlinuz-* $work/iso/vmlinuz
fi
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 $work/iso/isolinux/
# Bochs 2.7 states sizes of saved registers and a few features of this CPU wrongly; Linux boots without those.
cat >$work/iso/isolinux/isolinux.cfg <<'END'
default test
prompt 0
label test
 kernel /vmlinuz
 append initrd=/initrd console=ttyS0 quiet mitigations=off nopti lsm=capability clearcpuid=pku,xsavec,xsaves,xsaveopt,fsrm,umip,invpcid,smap,pcid,erms
END
xorriso -as mkisofs -quiet -o $work/boot.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table $work/iso
cat >$work/bochsrc <<END
cpu: model=corei7_icelake_u, count=1, ips=50000000
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial.log
display_library: rfb, options="timeout=0"
config_interface: textconfig
sound: driver=dummy
log: $work/bochs.log
END
echo c >$work/commands  # Debian's Bochs stops in its debugger first
rm -f $work/serial.log
timeout 1200 bochs-bin -q -f $work/bochsrc -rc $work/commands >$work/bochs.out 2>&1 </dev/null &
trap 'kill $! 2>/dev/null || true' EXIT
until grep -q "self_test ended" $work/serial.log 2>/dev/null; do
  sleep 2
  kill -0 $! 2>/dev/null || { cat $work/bochs.out; exit 1; }
done
cat $work/serial.log
grep -q "self_test ended with 0" $work/serial.log
