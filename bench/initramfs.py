#!/usr/bin/env python3
"""Packs a folder as an initramfs: initramfs.py FOLDER OUTPUT.

A gzipped newc cpio archive whose bytes depend on names, modes and contents only.
"""
import gzip
import os
import stat
import sys


def entry(name, mode, data, inode):
    fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def contents(folder, name):
    path = os.path.join(folder, name)
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        return mode, os.readlink(path).encode()
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            return mode, file.read()
    return mode, b""


def main(folder, output):
    names = ["."]
    for at, folders, files in os.walk(folder):
        names += [os.path.relpath(os.path.join(at, name), folder) for name in folders + files]
    archive = b"".join(
        entry(name.encode(), *contents(folder, name), inode) for inode, name in enumerate(sorted(names), 1)
    )
    archive += entry(b"TRAILER!!!", 0, b"", 0)
    with open(output, "wb") as file:
        file.write(gzip.compress(archive, 6, mtime=0))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
