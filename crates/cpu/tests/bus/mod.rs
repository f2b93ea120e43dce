//! The outside of a test's CPU: no devices, and at most one interrupt.

use umbra_arch::{AccessWidth, Bus, Fault, Gpa, Reply, VirtualTime};

/// One external interrupt, if `vector` is set, and one NMI, if `nmi` is; no devices.
#[derive(Default)]
pub struct OneInterrupt {
    pub vector: Option<u8>,
    pub nmi: bool,
}

impl Bus for OneInterrupt {
    fn mmio_read(&mut self, _: VirtualTime, _: Gpa, width: AccessWidth) -> Reply<u64> {
        Reply::quiet(width.mask())
    }
    fn mmio_write(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth, _: u64) -> Reply<()> {
        Reply::quiet(())
    }
    fn port_read(&mut self, _: VirtualTime, _: u16, _: AccessWidth) -> Reply<u32> {
        Reply::quiet(u32::MAX)
    }
    fn port_write(&mut self, _: VirtualTime, _: u16, _: AccessWidth, _: u32) -> Reply<()> {
        Reply::quiet(())
    }
    fn apic_msr_read(&mut self, _: VirtualTime, _: u32) -> Result<Reply<u64>, Fault> {
        Err(Fault::GP0)
    }
    fn apic_msr_write(&mut self, _: VirtualTime, _: u32, _: u64) -> Result<Reply<()>, Fault> {
        Err(Fault::GP0)
    }
    fn read_cr8(&mut self) -> u8 {
        0
    }
    fn write_cr8(&mut self, _: VirtualTime, _: u8) -> Reply<()> {
        Reply::quiet(())
    }
    fn interrupt_pending(&mut self) -> bool {
        self.vector.is_some()
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        self.vector.take()
    }
    fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }
}
