"""The benchmark programs by class, and the guests that run them."""
import os
from dataclasses import dataclass, replace

from emulators import Guest

SMALL, LARGE = "mini-amd64.cpio.gz", "initramfs-amd64.cpio.gz"
KERNEL, BARE_METAL, ROOT = "vmlinuz-cloud-amd64", "ubench.bin", "root-amd64"


@dataclass(frozen=True)
class Class:
    """Programs whose ratios are averaged, and the RAM disk that has them."""

    name: str
    initrd: str
    programs: tuple[str, ...]
    # The guest's scale changes their work.
    scales: bool = True


LINUX = (
    Class("integer", SMALL, ("sieve", "sort", "hash", "imat", "fib", "interp")),
    Class("fp-simd", SMALL, ("nbody", "x87", "matmul_sse", "matmul_best", "triad")),
    Class("moves", SMALL, ("repmovs", "memcpy", "memcpy4k")),
    Class("system", SMALL, ("fork", "forkexec", "mmap", "signal", "segv", "pipe", "getppid")),
    Class("translation", SMALL, ("bigcode", "smc")),
    # r-unzstd unpacks what r-zstd left, or packs it first.
    Class("real", LARGE,
          ("r-7zr", "r-zstd", "r-unzstd", "r-gzip", "r-sha256", "r-sqlite", "r-python", "r-shell"), scales=False),
)  # fmt: skip

# A scale that leaves programs one step of their work.
LEAST = 1e-9

# Groups of the bare-metal tests by the names' beginnings, behind 32- or 64-.
BARE_METAL_GROUPS = (
    ("wp", lambda name: name.startswith("wp")),
    ("cr3", lambda name: name.startswith("cr3")),
    ("other events", {"invlpg", "pf", "pfmap", "int", "int80", "syscall", "smc", "mode"}.__contains__),
)

BOOT, UBENCH = "boot", "ubench"
NAMES = [BOOT, UBENCH, *(program for group in LINUX for program in group.programs)]


def selected(names):
    """The classes with the programs of these names only; a class's name means all of it."""
    chosen = []
    for group in LINUX:
        programs = tuple(program for program in group.programs if {program, group.name} & names)
        if programs:
            chosen.append(replace(group, programs=programs))
    return chosen


def bare_metal_group(test):
    """The group of test `32-NAME` or `64-NAME`; None for tests that belong to none."""
    name = test.split("-", 1)[-1]
    return next((label for label, has in BARE_METAL_GROUPS if has(name)), None)


def linux_guest(folder, initrd, programs, scale):
    """The guest that runs these programs, one after the other."""
    append = f"bench={','.join(programs) or 'none'} scale={scale}"
    return Guest(os.path.join(folder, KERNEL), os.path.join(folder, initrd), append)


def bare_metal_guest(folder):
    """The guest without an operating system."""
    return Guest(os.path.join(folder, BARE_METAL), megabytes=256)


# In a mount namespace of its own, with a /tmp that lasts from one program to the next.
NATIVE = """
mount --rbind /dev "$1/dev" && mount --bind "$2" "$1/tmp" && mount -t proc proc "$1/proc" && shift 2
exec chroot "$@"
"""


def native_command(folder, scratch, scale, names):
    """Runs programs of the guest on the host: the same files, by chroot; needs root."""
    root = os.path.join(folder, ROOT)
    return ["unshare", "--mount", "sh", "-c", NATIVE, "sh", root, scratch, root, "/bench", str(scale), *names]
