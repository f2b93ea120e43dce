#!/usr/bin/env python3
"""What privileged operations cost under Umbra, beside QEMU TCG on the same machine.

    bench/mmu.py [--umbra PATH] [--engine jit|interp] [--qemu PATH] [--rounds N] [--json]

Runs the test ROM `costs` (`umbra rom run costs`) N times under each emulator, interleaved, and takes the
emulator's own CPU time at each line it prints. Prints operations per CPU second (medians) and the ratio to
the faster of QEMU's `-cpu max` and `-cpu max,la57=off`; then how much KERNEXEC's CR0.WP toggles slow down a
context-switching load. QEMU is left out, and that is said, where there is none.
"""
import argparse
import json
import statistics
import subprocess
import tempfile

import marked_run
from emulators import UMBRA, qemus

def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--umbra", default=UMBRA)
    arguments.add_argument("--engine", default="jit", help="of Umbra (default jit)")
    arguments.add_argument("--qemu", default="qemu-system-x86_64")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--timeout", type=int, default=120, help="seconds for one run")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.umbra, "rom", "write", "costs", folder], check=True)
        engines = {"umbra": [options.umbra, "rom", "run", "costs", "--engine", options.engine]}
        for qemu in qemus([options.qemu]):
            engines[qemu.name] = [
                *qemu.base(16), "-bios", f"{folder}/reset.bin",
                "-device", f"loader,file={folder}/costs.bin,addr=0x10000,force-raw=on",
            ]  # fmt: skip
        runs = {name: [] for name in engines}
        for _ in range(options.rounds):
            for name, command in engines.items():
                runs[name].append(marked_run.run(command, options.timeout).per_operation())
    medians = {}
    for engine, costs in runs.items():
        for name in runs["umbra"][0]:
            values = [run[name] for run in costs if name in run]
            if values:
                medians.setdefault(name, {})[engine] = statistics.median(values)
    if options.json:
        print(json.dumps(medians, indent=1))
        return
    print(f"{'operation':<20}{'Umbra ns':>12}{'QEMU ns':>12}{'ratio':>8}")
    for name, by_engine in medians.items():
        rivals = [cost for engine, cost in by_engine.items() if engine != "umbra"]
        own, rival = by_engine["umbra"] * 1e9, min(rivals, default=0) * 1e9
        ratio = f"{rival / own:8.2f}" if rival else f"{'-':>8}"
        print(f"{name:<20}{own:>12.1f}{rival:>12.1f}{ratio}")
    plain, kernexec = medians["switches-plain"]["umbra"], medians["switches-kernexec"]["umbra"]
    print(f"KERNEXEC's toggles slow the switches down by {100 * (kernexec / plain - 1):.1f} %")


if __name__ == "__main__":
    main()
