"""Runs the kernels' tests on an emulated machine with AVX-512 (without bf16), for those who have none: do its variants give the same bits?

    apt-get install --no-install-recommends bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso cpio busybox-static
    python3 kernels/emulate.py

Bochs computes floats in software, so that the answer does not depend on this machine's processor. Takes two minutes once all is
built, in target/emulated. The tests with a million draws are left out: they compare no variants.
"""

import glob
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "target", "emulated")
LIMIT_S = 1500
# Bochs 2.7 reports a wrong size of its XSAVE area; with these features on, Linux turns AVX off.
LINUX = "console=ttyS0,115200 nokaslr mitigations=off noxsaves clearcpuid=xsavec,xsaves nosmp random.trust_cpu=on panic=1"
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
for test in /bin/test-*; do $test --test-threads=1 --skip samples_follow; echo "== exit $? of $test"; done
/bin/test-bits --nocapture --test-threads=1 the_variant_is_told
echo "== done"
/bin/busybox poweroff -f
"""
ISOLINUX = f"default linux\nprompt 0\ntimeout 1\nlabel linux\n kernel vmlinuz\n initrd initrd\n append {LINUX}\n"
BOCHS = """display_library: term
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
megs: 512
cpu: model=corei7_skylake_x, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none, time0=utc
ata0: enabled=1
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
speaker: enabled=0
log: bochs.log
panic: action=fatal
error: action=report
"""


def build():
    """Static test binaries by name."""
    environment = dict(os.environ, RUSTFLAGS="-C target-feature=+crt-static", CARGO_TARGET_DIR=os.path.join(HERE, "cargo"))
    command = ["cargo", "test", "--release", "-p", "taper-kernels", "--lib", "--tests", "--no-run"]
    command += ["--target", "x86_64-unknown-linux-gnu", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    built = [json.loads(line) for line in lines]
    return {b["target"]["name"]: b["executable"] for b in built if b.get("executable") and b["profile"]["test"]}


def kernel():
    """A Linux kernel of Debian's, unpacked."""
    if not glob.glob("kernel/boot/vmlinuz-*"):
        facts = subprocess.check_output(["apt-cache", "depends", "linux-image-cloud-amd64"], text=True)
        package = next(line.split()[-1] for line in facts.splitlines() if "Depends: linux-image" in line)
        subprocess.run(["apt-get", "download", package], check=True)
        subprocess.run(["dpkg", "-x", glob.glob(f"{package}_*.deb")[0], "kernel"], check=True)
    return glob.glob("kernel/boot/vmlinuz-*")[0]


def image(tests):
    for folder in ["root/bin", "iso"]:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    shutil.copy(shutil.which("busybox"), "root/bin/busybox")
    for name, path in tests.items():
        subprocess.run(["strip", "-o", f"root/bin/test-{name}", path], check=True)
    with open("root/init", "w") as init:
        init.write(INIT)
    os.chmod("root/init", 0o755)
    subprocess.run("cd root && find . | cpio --quiet -o -H newc > ../iso/initrd", shell=True, check=True)
    shutil.copy(kernel(), "iso/vmlinuz")
    for path in ["/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"]:
        shutil.copy(path, "iso/")
    for path, text in [("iso/isolinux.cfg", ISOLINUX), ("bochsrc", BOCHS), ("bochs.rc", "continue\n")]:
        with open(path, "w") as file:
            file.write(text)
    command = "xorriso -as mkisofs -quiet -o boot.iso -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table iso"
    subprocess.run(command.split(), check=True)


def serial():
    try:
        with open("serial.txt", errors="replace") as file:
            return file.read().replace("\r", "")
    except FileNotFoundError:
        return ""


def boot():
    """What the guest printed; Bochs wants a terminal."""
    for name in ["serial.txt", "boot.iso.lock"]:
        if os.path.exists(name):
            os.remove(name)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execvp("bochs-bin", ["bochs-bin", "-q", "-f", "bochsrc", "-rc", "bochs.rc"])
    until = time.time() + LIMIT_S
    while time.time() < until and not any(end in serial() for end in ["== done", "Kernel panic"]):
        try:
            if select.select([terminal], [], [], 1.0)[0] and not os.read(terminal, 65536):
                break
        except OSError:
            break
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(pid, 0)
    return serial()


def main():
    os.makedirs(HERE, exist_ok=True)
    tests = build()
    os.chdir(HERE)
    image(tests)
    said = boot()
    lines = [line for line in said.splitlines() if line.startswith(("test ", "==", "variant")) or "panicked" in line]
    print("\n".join(lines))
    ends = [line for line in lines if line.startswith("== exit")]
    is_good = len(ends) == len(tests) and all(line.startswith("== exit 0 ") for line in ends)
    is_avx512 = "variant avx512\n" in said.replace("\r", "")
    print(f"variant avx512: {is_avx512}; {len(ends)} of {len(tests)} test programs ended, all well: {is_good}")
    sys.exit(0 if is_good and is_avx512 else 1)


main()
