"""Command lines of Umbra and QEMU for a guest, and what the benchmarks ask of both."""
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass

UMBRA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../target/release/umbra")

# Two models: LA57 costs QEMU a level of page walks, so the faster of both is the rival.
QEMU_MODELS = ("max", "max,la57=off")


@dataclass(frozen=True)
class Guest:
    """A kernel with its initial RAM disk, or a bare-metal program without."""

    kernel: str
    initrd: str | None = None
    append: str = ""
    megabytes: int = 1024

    def options(self, dashes):
        """Kernel, RAM disk and command line as Umbra (`--`) and QEMU (`-`) want them."""
        linux = [f"{dashes}initrd", self.initrd, f"{dashes}append", f"console=ttyS0 {self.append}".strip()]
        return [f"{dashes}kernel", self.kernel, *(linux if self.initrd else [])]


@dataclass(frozen=True)
class Umbra:
    """`umbra run` with one engine."""

    name: str
    path: str
    engine: str
    extra: tuple[str, ...] = ()

    def command(self, guest, timeout):
        return [self.path, "run", "--engine", self.engine, "--json", "--timeout", str(timeout), "-m",
                f"{guest.megabytes}M", *self.extra, *guest.options("--")]  # fmt: skip


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary, with TCG in one thread, and one of its CPU models."""

    name: str
    binary: tuple[str, ...]
    model: str

    def base(self, megabytes):
        """What every guest is started with."""
        return [*self.binary, "-accel", "tcg,thread=single", "-cpu", self.model, "-smp", "1", "-m", str(megabytes),
                "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]  # fmt: skip

    def command(self, guest, _timeout):
        exit_port = [] if guest.initrd else ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        return [*self.base(guest.megabytes), *exit_port, *guest.options("-")]


def qemus(binaries):
    """Every binary with every model; those that aren't there are named and left out.

    A binary may be a command with arguments, such as a loader with its library path."""
    found = []
    for number, text in enumerate(binaries):
        binary = tuple(shlex.split(text))
        if not shutil.which(binary[0]):
            print(f"{text} is not there: left out")
            continue
        label = "qemu" if len(binaries) == 1 else f"qemu{number + 1}"
        found += [Qemu(f"{label} {model}", binary, model) for model in QEMU_MODELS]
    return found


def version(binary):
    """The first line of `--version`."""
    answer = subprocess.run([*binary, "--version"], capture_output=True, text=True)
    return (answer.stdout.splitlines() or ["unknown version"])[0]
