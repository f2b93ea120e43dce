//! Accesses to device memory as the bus takes them.

use umbra_arch::{AccessWidth, Bus, Gpa, Reply, VirtualTime};

/// One access to device memory of up to eight bytes; lengths that are no width (parts of one that crosses a
/// page) become several. Says whether somebody wants attention.
pub(crate) fn access(bus: &mut dyn Bus, now: VirtualTime, gpa: u64, data: &mut [u8], write: bool) -> bool {
    let (mut at, mut attention) = (0, false);
    while at < data.len() {
        let size = 1usize << (data.len() - at).ilog2().min(3);
        let width = AccessWidth::of_bytes(size as u64).unwrap_or(AccessWidth::Byte);
        let place = Gpa::new(gpa.wrapping_add(at as u64));
        let piece = &mut data[at..at + size];
        let mut value = [0; 8];
        let reply = if write {
            value[..size].copy_from_slice(piece);
            let reply = bus.mmio_write(now, place, width, u64::from_le_bytes(value));
            Reply { value: (), ..reply }
        } else {
            let reply = bus.mmio_read(now, place, width);
            piece.copy_from_slice(&reply.value.to_le_bytes()[..size]);
            Reply { value: (), cost: reply.cost, attention: reply.attention }
        };
        attention |= reply.attention;
        at += size;
    }
    attention
}
