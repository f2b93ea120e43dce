//! A PC made of CPUs, memory and devices: memory map, boot protocols, events, run loop.
#![forbid(unsafe_code)]
