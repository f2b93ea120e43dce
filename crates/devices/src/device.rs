//! What every device promises, and when the machine calls it.
//!
//! All calls come from one thread. A device's inherent methods give its outputs: levels such as
//! `irq()` are read as often as the machine likes; `take_...` methods hand an event over once. The
//! machine polls outputs after every register access and after [`Device::advance`].
//!
//! Save and restore is serde: the value serialised at any moment between two calls and deserialised
//! later behaves like the original from then on, at the same virtual times.

use umbra_arch::{AccessWidth, VirtualTime};

/// A device that lives in virtual time.
pub trait Device {
    /// Brings the internal state up to `now`, which never is less than in an earlier call. Calling it
    /// twice with the same time is calling it once. Costs the same however long the gap was. Register
    /// accesses do this by themselves; the machine calls it when [`next_event`](Self::next_event) is due.
    fn advance(&mut self, now: VirtualTime);

    /// The earliest time at which an output changes if nobody touches the device, or `None` if none
    /// will. After `advance(now)` it is later than `now`. Ask again after every access.
    fn next_event(&self) -> Option<VirtualTime>;

    /// The hardware reset line: registers get their power-on values; time, configuration and contents
    /// that survive a reset (CMOS RAM, queued host input's backing) stay. Called between slices.
    fn reset(&mut self);
}

/// A device with I/O ports. The machine calls it for the ports the device names in its `PORTS`
/// constant; `port` is the absolute port number. Register accesses take effect in mid-instruction,
/// once for each architectural access.
pub trait PortDevice: Device {
    /// Reads `width` bytes at `port`; bits above the width are zero.
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32;
    /// Writes `width` bytes at `port`; bits of `value` above the width are ignored.
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32);
}

/// A device with memory-mapped registers; `offset` counts from the start of its region.
pub trait MmioDevice: Device {
    /// Reads `width` bytes at `offset`; bits above the width are zero.
    fn mmio_read(&mut self, now: VirtualTime, offset: u64, width: AccessWidth) -> u64;
    /// Writes `width` bytes at `offset`; bits of `value` above the width are ignored.
    fn mmio_write(&mut self, now: VirtualTime, offset: u64, width: AccessWidth, value: u64);
}
