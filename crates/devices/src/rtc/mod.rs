//! MC146818 real-time clock with CMOS RAM.

mod calendar;

use self::calendar::{Alarm, HOURS_24, Registers, decode_time, encode_time, field_at};
use crate::bytes::ByteFile;
use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

const SECOND: u64 = 1_000_000_000;
/// The crystal behind the divider chain.
const CRYSTAL_HZ: u64 = 32_768;
/// How long before an update UIP is set, in nanoseconds.
const UPDATE_WARNING: u64 = 244_000;

/// CMOS indices.
mod cmos {
    pub const ALARM_SECOND: u8 = 1;
    pub const ALARM_MINUTE: u8 = 3;
    pub const ALARM_HOUR: u8 = 5;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
    pub const EQUIPMENT: u8 = 0x14;
    pub const BASE_KIB: u8 = 0x15;
    pub const EXTENDED_KIB: u8 = 0x17;
    pub const EXTENDED_KIB_FOUND: u8 = 0x30;
    pub const ABOVE_16M: u8 = 0x34;
    pub const ABOVE_4G: u8 = 0x5b;
}
/// Register A: update in progress, and divider bits that hold the chain in reset.
const A_UIP: u8 = 0x80;
const A_DIVIDER_RESET: u8 = 0x60;
/// Register B bits beside the formats.
const B_SET: u8 = 0x80;
const B_UIE: u8 = 0x10;
/// Register C flags, at the places of their enable bits in B.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const C_IRQF: u8 = 0x80;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 0x80;

/// The clock at ports 70h/71h (and 72h/73h for the upper bank of RAM), IRQ 8.
///
/// The time is `offset` plus whole seconds of virtual time, so it starts at a configured instant and
/// never depends on the host. The interrupt line is the register C flag: up until C is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rtc {
    ram: ByteFile,
    index: u8,
    upper_index: u8,
    nmi_masked: bool,
    a: u8,
    b: u8,
    /// Flags without IRQF.
    c: u8,
    /// Unix time when the divider chain's second 0 began.
    offset: i64,
    /// Nanoseconds (below a second) that the divider chain is ahead of virtual time.
    phase: u64,
    /// Time registers while SET stops them.
    stopped: Option<Registers>,
    now: VirtualTime,
}

impl Rtc {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x70, 0x71, 0x72, 0x73];

    /// A clock that shows `unix_seconds` (UTC) at virtual time 0.
    pub fn new(unix_seconds: i64) -> Self {
        let mut ram = ByteFile::default();
        // Mouse and coprocessor present.
        ram.set(cmos::EQUIPMENT, 0x06);
        Self {
            ram,
            index: 0,
            upper_index: 0x80,
            nmi_masked: false,
            a: 0x26,
            b: HOURS_24,
            c: 0,
            // Registers have room for the years 0 to 9999.
            offset: unix_seconds.clamp(-62_000_000_000, 250_000_000_000),
            phase: 0,
            stopped: None,
            now: VirtualTime(0),
        }
    }

    /// Fills the memory-size bytes that firmware and old systems read: RAM bytes below 4 GiB and from
    /// 4 GiB up.
    pub fn set_memory_size(&mut self, below_4g: u64, above_4g: u64) {
        let units = |bytes: u64, unit: u64, limit: u64| (bytes / unit).min(limit);
        let extended = units(below_4g.saturating_sub(1 << 20), 1024, 0xffff);
        self.set_number(cmos::BASE_KIB, 640, 2);
        self.set_number(cmos::EXTENDED_KIB, extended, 2);
        self.set_number(cmos::EXTENDED_KIB_FOUND, extended, 2);
        self.set_number(cmos::ABOVE_16M, units(below_4g.saturating_sub(16 << 20), 1 << 16, 0xffff), 2);
        self.set_number(cmos::ABOVE_4G, units(above_4g, 1 << 16, 0xff_ffff), 3);
    }

    /// A byte of CMOS RAM, not of the clock's registers.
    pub fn cmos(&self, index: u8) -> u8 {
        self.ram.get(index)
    }

    /// Sets a byte of CMOS RAM, not of the clock's registers.
    pub fn set_cmos(&mut self, index: u8, value: u8) {
        self.ram.set(index, value);
    }

    /// Level of IRQ 8.
    pub fn irq(&self) -> bool {
        self.c & self.b & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// Whether port 70h bit 7 masks NMI.
    pub fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    fn set_number(&mut self, index: u8, value: u64, bytes: u8) {
        for i in 0..bytes {
            self.ram.set(index + i, (value >> (8 * i)) as u8);
        }
    }

    fn divider_runs(&self) -> bool {
        self.a & A_DIVIDER_RESET != A_DIVIDER_RESET
    }

    fn updates(&self) -> bool {
        self.divider_runs() && self.stopped.is_none()
    }

    /// Virtual time as the divider chain counts it.
    fn chain(&self, now: VirtualTime) -> VirtualTime {
        now.plus(self.phase)
    }

    fn virtual_time(&self, time: VirtualTime) -> VirtualTime {
        VirtualTime(time.0.saturating_sub(self.phase))
    }

    fn unix(&self, now: VirtualTime) -> i64 {
        self.offset.wrapping_add((self.chain(now).0 / SECOND) as i64)
    }

    fn time_registers(&self) -> Registers {
        self.stopped.unwrap_or_else(|| encode_time(self.unix(self.now), self.b))
    }

    fn alarm(&self) -> Alarm {
        let byte = |index| self.ram.get(index);
        Alarm::of_registers(byte(cmos::ALARM_SECOND), byte(cmos::ALARM_MINUTE), byte(cmos::ALARM_HOUR), self.b)
    }

    /// Crystal ticks between periodic interrupts.
    fn period(&self) -> Option<u64> {
        match self.a & 0xf {
            0 => None,
            // The two fastest rates of the divider table are slow ones at this crystal.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Flags that come up in the time from `self.now` (exclusive) to `now`.
    fn flags_until(&self, now: VirtualTime) -> u8 {
        if !self.divider_runs() || now <= self.now {
            return 0;
        }
        let mut flags = 0;
        let (from, to) = (self.chain(self.now), self.chain(now));
        if self.period().is_some_and(|period| from.ticks(CRYSTAL_HZ) / period != to.ticks(CRYSTAL_HZ) / period) {
            flags |= PERIODIC;
        }
        let (second, last) = (self.unix(self.now), self.unix(now));
        if self.updates() && last != second {
            flags |= UPDATE;
            if self.alarm().next_after(second).is_some_and(|alarm| alarm <= last) {
                flags |= ALARM;
            }
        }
        flags
    }

    /// Start of the Unix second `unix` in virtual time.
    fn second_starts(&self, unix: i64) -> VirtualTime {
        let chain = (unix.wrapping_sub(self.offset).max(0) as u64).saturating_mul(SECOND);
        self.virtual_time(VirtualTime(chain))
    }

    fn read_register(&mut self, index: u8) -> u8 {
        match index {
            cmos::A => self.a | if self.update_is_near() { A_UIP } else { 0 },
            cmos::B => self.b,
            cmos::C => {
                let irqf = if self.irq() { C_IRQF } else { 0 };
                std::mem::take(&mut self.c) | irqf
            }
            cmos::D => D_VALID,
            _ => match field_at(index) {
                Some(field) => self.time_registers()[field as usize],
                None => self.ram.get(index),
            },
        }
    }

    fn update_is_near(&self) -> bool {
        self.updates() && SECOND - self.chain(self.now).0 % SECOND <= UPDATE_WARNING
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match index {
            cmos::A => self.write_a(value & 0x7f),
            cmos::B => self.write_b(value),
            cmos::C | cmos::D => {}
            _ => match field_at(index) {
                Some(field) => {
                    let mut registers = self.time_registers();
                    registers[field as usize] = value;
                    if self.stopped.is_some() {
                        self.stopped = Some(registers);
                    } else {
                        self.set_time(&registers);
                    }
                }
                None => self.ram.set(index, value),
            },
        }
    }

    fn write_a(&mut self, value: u8) {
        let ran = self.divider_runs();
        let shown = self.unix(self.now);
        self.a = value;
        if !ran && self.divider_runs() {
            // "Divider Control": the first update comes half a second after the reset ends.
            self.phase = (SECOND / 2 + SECOND - self.now.0 % SECOND) % SECOND;
            self.offset = self.offset.wrapping_add(shown.wrapping_sub(self.unix(self.now)));
        }
    }

    fn write_b(&mut self, value: u8) {
        let registers = self.time_registers();
        let was_set = self.stopped.is_some();
        self.b = if value & B_SET != 0 { value & !B_UIE } else { value };
        match (was_set, value & B_SET != 0) {
            (false, true) => self.stopped = Some(registers),
            (true, false) => {
                self.stopped = None;
                self.set_time(&registers);
            }
            _ => {}
        }
    }

    fn set_time(&mut self, registers: &Registers) {
        let change = decode_time(registers, self.b).wrapping_sub(self.unix(self.now));
        self.offset = self.offset.wrapping_add(change);
    }

    fn read(&mut self, port: u16) -> u8 {
        match port {
            0x71 => self.read_register(self.index),
            0x73 => self.read_register(self.upper_index),
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u16, value: u8) {
        match port {
            0x70 => {
                self.index = value & 0x7f;
                self.nmi_masked = value & 0x80 != 0;
            }
            0x71 => self.write_register(self.index, value),
            0x72 => self.upper_index = value | 0x80,
            0x73 => self.write_register(self.upper_index, value),
            _ => {}
        }
    }
}

impl Device for Rtc {
    fn advance(&mut self, now: VirtualTime) {
        self.c |= self.flags_until(now);
        self.now = self.now.max(now);
    }

    fn next_event(&self) -> Option<VirtualTime> {
        if self.irq() || !self.divider_runs() {
            return None;
        }
        let enabled = |flag| self.b & flag != 0;
        let periodic = self.period().filter(|_| enabled(PERIODIC)).map(|period| {
            let next = (self.chain(self.now).ticks(CRYSTAL_HZ) / period + 1) * period;
            self.virtual_time(VirtualTime::of_ticks(next, CRYSTAL_HZ))
        });
        let second = self.unix(self.now);
        let update = (enabled(UPDATE) && self.updates()).then(|| self.second_starts(second.wrapping_add(1)));
        let alarm = (enabled(ALARM) && self.updates()).then(|| self.alarm().next_after(second)).flatten();
        let alarm = alarm.map(|alarm| self.second_starts(alarm));
        [periodic, update, alarm].into_iter().flatten().min()
    }

    /// The battery keeps time and RAM; interrupts are off.
    fn reset(&mut self) {
        self.b &= !(PERIODIC | ALARM | UPDATE | 0x08);
        self.c = 0;
        self.index = 0;
        self.nmi_masked = false;
    }
}

impl PortDevice for Rtc {
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        self.advance(now);
        regmap::read_bytes(port, width, |port| self.read(port))
    }
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        self.advance(now);
        regmap::write_bytes(port, width, value, |port, byte| self.write(port, byte));
    }
}

#[cfg(test)]
mod tests;
