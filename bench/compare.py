#!/usr/bin/env python3
"""Measures Umbra beside QEMU TCG, and the host itself, on the same programs.

    bench/compare.py --guests FOLDER [--programs NAME,...] [--rounds N] [--scale F] [--qemu COMMAND]...
                     [--engines jit,interp] [--umbra-options STRING] [--net] [--no-native] [--no-counters] [--json FILE]

Each round starts every emulator once per class of programs, one after the other; a program costs the CPU seconds
(user and system, all threads) that the emulator's process uses between the guest's lines @@S and @@E. Prints medians,
the ratio to QEMU (the faster of its CPU models, per program), the ratio to the host, geometric means per class; then what
Umbra's instructions were executed by, and context refills per million instructions, from a run of each program by
itself less a run without any. bench/README.md says what FOLDER has to hold.
"""
import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile

import marked_run
import programs
from emulators import UMBRA, Umbra, qemus, version

NATIVE = "native"


class Figures:
    """CPU seconds by program and engine, one for each round."""

    def __init__(self):
        self.values = {}

    def add(self, engine, costs):
        for program, seconds in costs.items():
            self.values.setdefault(program, {}).setdefault(engine, []).append(seconds)

    def programs(self):
        return list(self.values)

    def median(self, program, engine):
        values = self.values.get(program, {}).get(engine)
        return statistics.median(values) if values else None

    def best(self, program, engines):
        """The least median, and whose it is."""
        found = [(self.median(program, engine), engine) for engine in engines]
        return min(((seconds, engine) for seconds, engine in found if seconds is not None), default=(None, None))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", required=True, metavar="FOLDER")
    parser.add_argument("--umbra", default=UMBRA, metavar="PATH", help="default: the release build")
    parser.add_argument("--umbra-options", default="--cpu max", metavar="STRING",
                        help="further options of `umbra run` (default `--cpu max`, as QEMU has)")  # fmt: skip
    parser.add_argument("--engines", default="jit", help="of Umbra; the first is compared (default jit)")
    parser.add_argument("--qemu", action="append", metavar="COMMAND", help="may be given several times")
    parser.add_argument("--no-qemu", action="store_true")
    parser.add_argument("--no-native", action="store_true")
    parser.add_argument("--no-counters", action="store_true")
    parser.add_argument("--programs", help=f"comma-separated; classes or {' '.join(programs.NAMES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="amount of work of programs that have one")
    parser.add_argument("--net", action="store_true", help="take off what programs cost with no work to do: their start")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one run")
    parser.add_argument("--json", metavar="FILE", help="all figures, for programs")
    return parser.parse_args()


def chosen_names(options):
    known = {*programs.NAMES, *(group.name for group in programs.LINUX)}
    given = options.programs.split(",") if options.programs else known
    names = {f"r-{name}" if f"r-{name}" in known else name for name in given}
    if names - known:
        sys.exit(f"--programs: no {', '.join(sorted(names - known))}; there are {', '.join(sorted(known))}")
    return names


def one_run(engine, guest, timeout):
    """A run; what went wrong is said, and the figures that are there are used."""
    result = marked_run.run(engine.command(guest, timeout), timeout)
    ended = result.until("@@DONE") is not None or guest.initrd is None
    if not ended or not result.marks:
        tail = "\n".join(result.stderr.splitlines()[-5:])
        print(f"{engine.name} ended with {result.status} before its time:\n{tail}", file=sys.stderr)
    return result


class Measurement:
    """Figures of the Linux guest's programs and of the bare-metal tests, round by round."""

    def __init__(self, options, engines, scratch):
        self.options = options
        self.engines = engines
        self.scratch = scratch
        self.linux, self.bare_metal = Figures(), Figures()

    def round(self, groups, names):
        has_boot = programs.BOOT not in names
        for group in groups:
            for engine in self.engines:
                result, costs = self.emulated(engine, group)
                self.linux.add(engine.name, costs)
                # The larger RAM disk takes longer to unpack.
                if not has_boot and group.initrd == programs.SMALL:
                    self.linux.add(engine.name, {programs.BOOT: result.until("@@INIT")})
            if not self.options.no_native:
                self.linux.add(NATIVE, self.native(group))
            has_boot = has_boot or group.initrd == programs.SMALL
        if not has_boot:
            self.boot()
        if programs.UBENCH in names:
            guest = programs.bare_metal_guest(self.options.guests)
            for engine in self.engines:
                result = one_run(engine, guest, self.options.timeout)
                self.bare_metal.add(engine.name, result.per_operation(base=16))

    def boot(self):
        guest = programs.linux_guest(self.options.guests, programs.SMALL, (), self.options.scale)
        for engine in self.engines:
            result = one_run(engine, guest, self.options.timeout)
            self.linux.add(engine.name, {programs.BOOT: result.until("@@INIT")})

    def emulated(self, engine, group):
        """A run of a class, and what its programs cost."""

        def at(scale):
            guest = programs.linux_guest(self.options.guests, group.initrd, group.programs, scale)
            return one_run(engine, guest, self.options.timeout)

        result = at(self.options.scale)
        costs = result.between("@@S", "@@E")
        return result, self.net(group, costs, lambda: at(programs.LEAST).between("@@S", "@@E"))

    def native(self, group):
        """What the programs cost on the host."""
        costs = self.native_at(group, self.options.scale)
        return self.net(group, costs, lambda: self.native_at(group, programs.LEAST))

    def native_at(self, group, scale):
        def on_host(*names):
            command = programs.native_command(self.options.guests, self.scratch, scale, names)
            return marked_run.run(command, self.options.timeout)

        # What starts the programs is no part of them.
        start = on_host().cpu
        costs = {}
        for program in group.programs:
            result = on_host(program)
            if result.status == 0 and result.until("@@E") is not None:
                costs[program] = result.cpu - start
            else:
                print(f"{program} doesn't run on the host: {result.stderr.strip()}", file=sys.stderr)
        return costs

    def net(self, group, costs, starting):
        """Costs less those of starting, if that is wanted and there is anything else."""
        if not self.options.net or not group.scales:
            return costs
        least = starting()
        return {program: costs[program] - least[program] for program in costs if program in least}


def counters(options, engine, groups):
    """What Umbra counted while each program ran."""
    nothing = {}
    found = {}
    for group in groups:
        if group.initrd not in nothing:
            nothing[group.initrd] = counted(options, engine, group.initrd, ())
        for program in group.programs:
            before, after = nothing[group.initrd], counted(options, engine, group.initrd, (program,))
            if before and after:
                found[program] = {name: after[name] - before[name] for name in after}
    return found


def counted(options, engine, initrd, names):
    guest = programs.linux_guest(options.guests, initrd, names, options.scale)
    stderr = one_run(engine, guest, options.timeout).stderr
    try:
        report = json.loads(stderr.splitlines()[-1])
    except (IndexError, ValueError):
        return None
    jit = report.get("jit", {})
    return {
        "retired": report["retired"],
        "translated": jit.get("ops_translated", 0),
        "helper": jit.get("ops_by_helper", 0),
        "refills": report["mmu"]["refills"],
    }


def geomean(values):
    values = [value for value in values if value and value > 0]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def number(value, width, digits=2):
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def ratio(of, to):
    return of / to if of and to and min(of, to) > 0 else None


def print_linux(figures, engines, rivals, groups, names):
    """The table of the Linux guest's programs."""
    own, others = engines[0].name, [engine.name for engine in engines[1:] if engine.name not in rivals]
    columns = [NATIVE, own, *others]
    print(f"\n{'CPU seconds':<22}" + "".join(f"{name:>12}" for name in columns)
          + f"{'QEMU':>10}  {'its model':<18}{'QEMU/Umbra':>11}{'Umbra/native':>13}")  # fmt: skip
    rows = [(group.name, group.programs) for group in groups]
    if programs.BOOT in names:
        rows.append(("boot", (programs.BOOT,)))
    for label, members in rows:
        faster, slower = [], []
        for program in members:
            best, whose = figures.best(program, rivals)
            mine = figures.median(program, own)
            faster.append(ratio(best, mine))
            slower.append(ratio(mine, figures.median(program, NATIVE)))
            seconds = "".join(number(figures.median(program, name), 12, 3) for name in columns)
            print(f"{program:<22}{seconds}{number(best, 10, 3)}  {(whose or '-'):<18}{number(faster[-1], 11)}"
                  f"{number(slower[-1], 13)}")  # fmt: skip
        if len(members) > 1:
            width = 22 + 12 * len(columns) + 30
            print(f"{'  geomean, ' + label:<{width}}{number(geomean(faster), 11)}{number(geomean(slower), 13)}")


def print_bare_metal(figures, engines, rivals):
    """The table of privileged operations."""
    own = engines[0].name
    print(f"\n{'ns per operation':<22}{own:>12}{'QEMU':>12}  {'its model':<18}{'QEMU/Umbra':>11}")
    groups = {}
    for test in figures.programs():
        best, whose = figures.best(test, rivals)
        mine = figures.median(test, own)
        faster = ratio(best, mine)
        groups.setdefault(programs.bare_metal_group(test), []).append(faster)
        nanoseconds = [None if value is None else value * 1e9 for value in (mine, best)]
        print(f"{test:<22}{number(nanoseconds[0], 12, 1)}{number(nanoseconds[1], 12, 1)}  {(whose or '-'):<18}"
              f"{number(faster, 11)}")  # fmt: skip
    for label, _ in programs.BARE_METAL_GROUPS:
        print(f"{'  geomean, ' + label:<66}{number(geomean(groups.get(label, [])), 11)}")


def print_counters(found):
    print(f"\n{'instructions':<22}{'millions':>10}{'host code':>11}{'functions':>11}{'interpreter':>12}"
          f"{'refills/M':>11}")  # fmt: skip
    for program, counts in found.items():
        total = counts["retired"]
        if total <= 0:
            continue
        host_code = counts["translated"] - counts["helper"]
        shares = [host_code / total, counts["helper"] / total, 1 - counts["translated"] / total]
        texts = [f"{100 * share:.2f}%" for share in shares]
        print(f"{program:<22}{total / 1e6:>10.1f}{texts[0]:>11}{texts[1]:>11}{texts[2]:>12}"
              f"{counts['refills'] / total * 1e6:>11.2f}")  # fmt: skip


def print_conditions(options, engines, groups):
    """What was compared, and on what."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
    print(f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}; rounds {options.rounds}, "
          f"scale {options.scale}{', net' if options.net else ''}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    guest = programs.linux_guest(options.guests, groups[0].initrd if groups else programs.SMALL, (), options.scale)
    seen = set()
    for engine in engines:
        binary = engine.binary if hasattr(engine, "binary") else (engine.path,)
        if binary not in seen:
            seen.add(binary)
            print(version(binary))
        print(f"  {engine.name}: {' '.join(engine.command(guest, options.timeout))}")


def main():
    options = arguments()
    names = chosen_names(options)
    groups = programs.selected(names)
    extra = tuple(options.umbra_options.split())
    engines = [Umbra(f"umbra {name}", options.umbra, name, extra) for name in options.engines.split(",")]
    rivals = [] if options.no_qemu else qemus(options.qemu or ["qemu-system-x86_64"])
    engines += rivals
    print_conditions(options, engines, groups)
    with tempfile.TemporaryDirectory() as scratch:
        measurement = Measurement(options, engines, scratch)
        for done in range(options.rounds):
            measurement.round(groups, names)
            print(f"round {done + 1} of {options.rounds} done", file=sys.stderr)
    rival_names = [rival.name for rival in rivals]
    found = {} if options.no_counters else counters(options, engines[0], groups)
    linux, bare_metal = measurement.linux, measurement.bare_metal
    if linux.programs():
        print_linux(linux, engines, rival_names, groups, names)
    if bare_metal.programs():
        print_bare_metal(bare_metal, engines, rival_names)
    if found:
        print_counters(found)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"linux": linux.values, "bare_metal": bare_metal.values, "counters": found}, file, indent=1)


if __name__ == "__main__":
    main()
