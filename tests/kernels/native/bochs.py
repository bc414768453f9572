"""Runs the AVX-512 library itself on any processor, its calls replayed inside Bochs, which emulates one in software.

    apt-get install bochs xorriso isolinux syslinux-common
    python -m tests.kernels.native.bochs

records what `cases.digests` calls on this machine (AVX2), boots Debian's kernel in Bochs with nothing in memory but
replay.c, the library and the record, and compares all memory. SIMDe, which test_isa uses, has other code do what the
intrinsics say; here the compiled instructions run. It takes minutes and needs the kernel's package, so no test does it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.kernels.native.build import ROOT, build_replay, record_calls

TOOLS = {  # what must be there, and Debian's package that brings it
    Path("/usr/bin/bochs"): "bochs",
    Path("/usr/bin/xorriso"): "xorriso",
    Path("/usr/lib/ISOLINUX/isolinux.bin"): "isolinux",
    Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"): "syslinux-common",
}
LIBRARY = ROOT / "kernels" / "cpu" / "_native_avx512.so"

BOCHS = """\
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={folder}/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={folder}/serial
log: {folder}/log
panic: action=fatal
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
clock: sync=none
"""
# The kernel starts the replay as its first process; when that ends the kernel has nothing left to do and panics. Bochs
# gives the compacted form of saved registers a size that the kernel refuses, and all of AVX with it: hence clearcpuid.
ISOLINUX = """\
DEFAULT replay
LABEL replay
KERNEL /kernel
APPEND initrd=/memory console=ttyS0,115200 mitigations=off clearcpuid=xsaves,xsavec rdinit=/replay -- /library /record
"""


def main(model: str, limit_s: int, library: Path) -> int:
    missing = sorted(package for path, package in TOOLS.items() if not path.exists())
    if missing:
        raise SystemExit(f"not installed: apt-get install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(record_calls(folder / "record"), flush=True)
        replay = build_replay(folder / "replay")
        files = {"replay": replay, "library": library, "record": folder / "record"}
        files |= {path.lstrip("/"): Path(path) for path in _shared_libraries(replay, library)}
        disc = folder / "disc"
        (disc / "isolinux").mkdir(parents=True)
        (disc / "memory").write_bytes(_archive(files))
        (disc / "kernel").write_bytes(_kernel(folder))
        (disc / "isolinux" / "isolinux.cfg").write_text(ISOLINUX)
        for path in TOOLS:
            if path.suffix in (".bin", ".c32"):
                (disc / "isolinux" / path.name).write_bytes(path.read_bytes())
        boot = ["-b", "isolinux/isolinux.bin", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
        image = ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "disc.iso"), *boot, str(disc)]
        subprocess.run(image, check=True, capture_output=True)
        (folder / "bochsrc").write_text(BOCHS.format(model=model, folder=folder))
        said = _run(folder, limit_s)
    print(f"Bochs, {model}, {library.name}:\n{said}")
    return 0 if re.search(r"^[1-9]\d* calls replayed, 0 differ", said, re.MULTILINE) else 1


def _run(folder: Path, limit_s: int) -> str:
    """Boots; returns what the serial port said up to the end of the replay."""
    (folder / "continue").write_text("c\n")  # Debian's Bochs has its debugger built in, which starts by waiting
    command = ["bochs", "-q", "-f", str(folder / "bochsrc"), "-rc", str(folder / "continue")]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        serial, start = folder / "serial", time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - start < limit_s:
                said = serial.read_text(errors="replace") if serial.exists() else ""
                if "calls replayed" in said or "Kernel panic" in said:
                    return said
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
    said = serial.read_text(errors="replace") if serial.exists() else ""
    return f"{said}\nno result within {limit_s} s; Bochs' last words:\n{(folder / 'out').read_text()[-2000:]}"


def _shared_libraries(*programs: Path) -> set[str]:
    """Absolute paths of what the programs load, the loader itself included."""
    said = "".join(subprocess.run(["ldd", str(x)], check=True, capture_output=True, text=True).stdout for x in programs)
    return set(re.findall(r"(/\S+) \(0x", said))


def _kernel(folder: Path) -> bytes:
    """Debian's kernel for virtual machines, from its package, which is unpacked and not installed."""
    meta = ["apt-cache", "depends", "linux-image-cloud-amd64"]
    found = re.search(r"Depends: (\S+)", subprocess.run(meta, check=True, capture_output=True, text=True).stdout)
    if found is None:
        raise SystemExit("apt knows no package linux-image-cloud-amd64: run apt-get update")
    subprocess.run(["apt-get", "download", "-q", found[1]], cwd=folder, check=True, capture_output=True)
    package = next(folder.glob("linux-image-*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "package")], check=True)
    return next((folder / "package" / "boot").glob("vmlinuz-*")).read_bytes()


def _archive(files: dict[str, Path]) -> bytes:
    """The kernel's initial file system, a cpio archive ("newc"): the files, their folders and a console."""
    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."} | {"dev"})
    entries = [(name, 0o040755, 0, b"") for name in folders]
    entries += [("dev/console", 0o020600, 1, b"")]  # character device 5:1
    entries += [(name, 0o100755, 0, path.read_bytes()) for name, path in files.items()]
    entries += [("TRAILER!!!", 0, 0, b"")]
    out = bytearray()
    for inode, (name, mode, minor, data) in enumerate(entries):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 5 * minor, minor, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="corei7_skylake_x", help="processor, as `bochs -help cpu` lists them")
    parser.add_argument("--limit-s", type=int, default=3600)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    options = parser.parse_args()
    sys.exit(main(options.model, options.limit_s, options.library))
