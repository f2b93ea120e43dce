"""Runs a program and takes its CPU time at each line that it marks with @@."""
import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    """User and system time of a running process: all its threads, dead ones too, and its reaped children."""
    # The clock of a process, as clock_getcpuclockid(3) makes it.
    own = time.clock_gettime((~pid) << 3 | 2)
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return own + (int(fields[13]) + int(fields[14])) / TICKS


@dataclass
class MarkedRun:
    """What was seen of a run."""

    # Marked lines, from @@ on, each with the CPU seconds used until it came.
    marks: list[tuple[str, float]] = field(default_factory=list)
    # All of the process and its children, from start to end.
    cpu: float = 0.0
    stderr: str = ""
    status: int = 0

    def between(self, begin, end):
        """CPU seconds between lines `begin NAME` and `end NAME`, by name; only where `end` says rc=0, if it
        says a code."""
        costs, started = {}, {}
        for line, cpu in self.marks:
            word, *rest = line.split()
            if word == begin and rest:
                started[rest[0]] = cpu
            elif word == end and rest and rest[0] in started:
                if not any(part.startswith("rc=") and part != "rc=0" for part in rest):
                    costs[rest[0]] = cpu - started[rest[0]]
        return costs

    def per_operation(self, base=10):
        """CPU seconds per operation, by name, of lines `@@U NAME [iters=]COUNT`, each about the time since the
        marked line before it."""
        costs, before = {}, None
        for line, cpu in self.marks:
            word, *rest = line.split()
            if word == "@@U" and len(rest) > 1 and before is not None:
                count = int(rest[1].removeprefix("iters="), base)
                if count:
                    costs[rest[0]] = (cpu - before) / count
            before = cpu
        return costs

    def until(self, word):
        """CPU seconds from the start until the first line that begins with `word`; None without one."""
        return next((cpu for line, cpu in self.marks if line.split()[0] == word), None)


def run(command, timeout):
    """Runs a command to its end, or kills it after `timeout` seconds."""
    result = MarkedRun()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        killer = threading.Timer(timeout, process.kill)
        killer.start()
        try:
            for line in process.stdout:
                _, mark, rest = line.decode("utf-8", "replace").partition("@@")
                if mark:
                    result.marks.append((mark + rest.strip(), cpu_seconds(process.pid)))
        finally:
            _, status, usage = os.wait4(process.pid, 0)
            result.status = os.waitstatus_to_exitcode(status)
            # It is reaped: Popen must not wait for it again.
            process.returncode = result.status
            killer.cancel()
            process.stdout.close()
        result.cpu = usage.ru_utime + usage.ru_stime
        errors.seek(0)
        result.stderr = errors.read()
    return result
