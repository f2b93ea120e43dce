//! MADT ("Multiple APIC Description Table").

use super::fixed::SCI_IRQ;
use super::table::Table;
use crate::memory_map::{IOAPIC_BASE, LAPIC_BASE};

/// Id of the one I/O APIC.
pub(crate) const IOAPIC_ID: u8 = 0;
/// ISA interrupt 0 (the 8254) arrives at this I/O APIC pin.
pub(crate) const TIMER_PIN: usize = 2;
/// ISA interrupts that PCI devices are routed to.
pub(super) const PCI_IRQS: [u8; 2] = [10, 11];

/// MPS INTI flags: active high, level-triggered.
const LEVEL_HIGH: u16 = 0xd;
/// The machine also has two 8259s.
const PCAT_COMPAT: u32 = 1;

pub(super) fn madt(vcpus: u32) -> Vec<u8> {
    let mut t = Table::new(b"APIC", 3);
    t.u32(LAPIC_BASE as u32);
    t.u32(PCAT_COMPAT);
    for id in 0..vcpus.min(255) as u8 {
        t.raw(&[0, 8, id, id]);
        t.u32(1);
    }
    t.raw(&[1, 12, IOAPIC_ID, 0]);
    t.u32(IOAPIC_BASE as u32);
    t.u32(0);
    source_override(&mut t, 0, TIMER_PIN as u32, 0);
    for irq in [SCI_IRQ].into_iter().chain(PCI_IRQS) {
        source_override(&mut t, irq, irq.into(), LEVEL_HIGH);
    }
    // NMI at LINT1 of every CPU.
    t.raw(&[4, 6, 0xff, 0, 0, 1]);
    t.finish()
}

/// "Interrupt Source Override Structure" for ISA interrupt `irq`.
fn source_override(t: &mut Table, irq: u8, gsi: u32, flags: u16) {
    t.raw(&[2, 10, 0, irq]);
    t.u32(gsi);
    t.u16(flags);
}
