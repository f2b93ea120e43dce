//! A [`Bus`] whose devices answer from the input, deterministically.

use umbra_arch::{AccessWidth, Bus, Fault, Gpa, Reply, VirtualTime};

/// Answers every access with the next bytes of `data`, then with zeros; now and then asks for attention,
/// charges time, or has an interrupt waiting.
pub struct InputBus<'a> {
    data: &'a [u8],
    at: usize,
    cr8: u8,
    waiting: Option<u8>,
}

impl<'a> InputBus<'a> {
    /// A bus that answers from `data`.
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, cr8: 0, waiting: None }
    }

    fn byte(&mut self) -> u8 {
        let byte = self.data.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        byte
    }

    fn reply<T>(&mut self, value: T) -> Reply<T> {
        let byte = self.byte();
        let interrupts = byte & 7 == 7;
        if interrupts {
            self.waiting = Some(byte | 0x20);
        }
        Reply { value, cost: u32::from(byte >> 4) * 100, attention: interrupts || byte & 8 != 0 }
    }

    fn value(&mut self) -> u64 {
        (0..8).fold(0, |v, _| v << 8 | u64::from(self.byte()))
    }
}

impl Bus for InputBus<'_> {
    fn mmio_read(&mut self, _: VirtualTime, _: Gpa, width: AccessWidth) -> Reply<u64> {
        let value = self.value() & width.mask();
        self.reply(value)
    }
    fn mmio_write(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth, _: u64) -> Reply<()> {
        self.reply(())
    }
    fn port_read(&mut self, _: VirtualTime, _: u16, _: AccessWidth) -> Reply<u32> {
        let value = self.value() as u32;
        self.reply(value)
    }
    fn port_write(&mut self, _: VirtualTime, _: u16, _: AccessWidth, _: u32) -> Reply<()> {
        self.reply(())
    }
    fn apic_msr_read(&mut self, _: VirtualTime, msr: u32) -> Result<Reply<u64>, Fault> {
        if msr & 1 != 0 {
            return Err(Fault::GP0);
        }
        let value = self.value();
        Ok(self.reply(value))
    }
    fn apic_msr_write(&mut self, _: VirtualTime, msr: u32, _: u64) -> Result<Reply<()>, Fault> {
        if msr & 1 != 0 { Err(Fault::GP0) } else { Ok(self.reply(())) }
    }
    fn read_cr8(&mut self) -> u8 {
        self.cr8
    }
    fn write_cr8(&mut self, _: VirtualTime, value: u8) -> Reply<()> {
        self.cr8 = value;
        self.reply(())
    }
    fn interrupt_pending(&mut self) -> bool {
        self.waiting.is_some()
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        self.waiting.take()
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
}
