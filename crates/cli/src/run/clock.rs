//! Virtual time against the host's clock.

use std::time::{Duration, Instant};
use umbra_arch::VirtualTime;

/// A guest that has fallen behind by more than this doesn't try to catch up.
const GIVE_UP: Duration = Duration::from_millis(100);

/// Ties virtual time to the host's clock.
#[derive(Debug)]
pub struct RealClock {
    origin: Instant,
    base: VirtualTime,
}

impl RealClock {
    pub fn new(now: Instant) -> Self {
        Self { origin: now, base: VirtualTime(0) }
    }

    /// How long the guest has to wait at `host` until it may be at `target`.
    pub fn ahead(&mut self, host: Instant, target: VirtualTime) -> Duration {
        let due = self.origin + Duration::from_nanos(target.since(self.base));
        if host.saturating_duration_since(due) > GIVE_UP {
            (self.origin, self.base) = (host, target);
        }
        due.saturating_duration_since(host)
    }

    /// The virtual time that belongs to `host`.
    pub fn at(&self, host: Instant) -> VirtualTime {
        self.base.plus(host.saturating_duration_since(self.origin).as_nanos() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_when_ahead_and_forgets_when_far_behind() {
        let start = Instant::now();
        let mut clock = RealClock::new(start);
        let ms = |n| Duration::from_millis(n);
        assert_eq!(clock.ahead(start, VirtualTime(5_000_000)), ms(5));
        assert_eq!(clock.ahead(start + ms(50), VirtualTime(5_000_000)), ms(0));
        assert_eq!(clock.ahead(start + ms(50), VirtualTime(60_000_000)), ms(10), "a short delay is caught up");
        assert_eq!(clock.ahead(start + ms(500), VirtualTime(60_000_000)), ms(0));
        assert_eq!(clock.ahead(start + ms(500), VirtualTime(61_000_000)), ms(1), "a long one isn't");
        assert_eq!(clock.at(start + ms(502)), VirtualTime(62_000_000));
    }
}
