//! Host input without blocking.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::time::Duration;

/// Reads stdin when something is there.
#[derive(Debug, Default)]
pub struct Stdin {
    ended: bool,
}

impl Stdin {
    /// Waits until input is there or `limit` has passed; a signal also ends the wait.
    pub fn wait(&self, limit: Duration) -> bool {
        if self.ended {
            std::thread::sleep(limit);
            return false;
        }
        let stdin = io::stdin();
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        matches!(poll(&mut fds, Some(&timeout)), Ok(n) if n > 0)
    }

    /// What is there now, at most `limit` bytes.
    pub fn take(&mut self, limit: usize) -> Vec<u8> {
        if self.ended || !self.wait(Duration::ZERO) {
            return Vec::new();
        }
        let mut buffer = vec![0; limit];
        match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(0) => self.ended = true,
            Ok(len) => return buffer[..len].to_vec(),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.ended = true,
        }
        Vec::new()
    }
}
