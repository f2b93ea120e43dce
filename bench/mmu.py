#!/usr/bin/env python3
"""What privileged operations cost under Umbra, beside QEMU TCG on the same machine.

    bench/mmu.py [--umbra PATH] [--qemu PATH] [--rounds N] [--json]

Runs the test ROM `costs` (`umbra rom run costs`) N times under each emulator, interleaved, and takes the
emulator's own CPU time at each line it prints. Prints operations per CPU second (medians) and the ratio to
the faster of QEMU's `-cpu max` and `-cpu max,la57=off`; then how much KERNEXEC's CR0.WP toggles slow down a
context-switching load. QEMU is left out, and that is said, where there is none.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile

LINE = re.compile(r"@@U (\S+) (\d+)")


def cpu_seconds(pid):
    """CPU time of all threads, in seconds."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/schedstat") as stat:
                total += int(stat.read().split()[0])
        except OSError:
            pass
    return total / 1e9


def one_run(command, timeout):
    """Seconds of CPU time per operation, by name."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    killer = subprocess.Popen(["sh", "-c", f"sleep {timeout}; kill {process.pid}"], stderr=subprocess.DEVNULL)
    costs, before = {}, None
    try:
        for line in process.stdout:
            match = LINE.search(line.decode("ascii", "replace"))
            if not match:
                continue
            now, count = cpu_seconds(process.pid), int(match[2])
            if before is not None and count:
                costs[match[1]] = (now - before) / count
            before = now
    finally:
        process.kill()
        process.wait()
        killer.kill()
        killer.wait()
    return costs


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--umbra", default=os.path.join(os.path.dirname(__file__), "../target/release/umbra"))
    arguments.add_argument("--qemu", default="qemu-system-x86_64")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--timeout", type=int, default=120, help="seconds for one run")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.umbra, "rom", "write", "costs", folder], check=True)
        engines = {"umbra": [options.umbra, "rom", "run", "costs"]}
        if shutil.which(options.qemu):
            for name in ("max", "max,la57=off"):
                engines[f"qemu -cpu {name}"] = [
                    options.qemu, "-accel", "tcg,thread=single", "-cpu", name, "-m", "16", "-nodefaults",
                    "-display", "none", "-no-reboot", "-serial", "stdio", "-bios", f"{folder}/reset.bin",
                    "-device", f"loader,file={folder}/costs.bin,addr=0x10000,force-raw=on",
                ]  # fmt: skip
        else:
            print(f"{options.qemu} is not there: Umbra alone")
        runs = {name: [] for name in engines}
        for _ in range(options.rounds):
            for name, command in engines.items():
                runs[name].append(one_run(command, options.timeout))
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
