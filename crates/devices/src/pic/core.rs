//! Registers of one 8259A interrupt controller.

use serde::{Deserialize, Serialize};

/// Which initialisation command word the data port expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Expect {
    /// None: operation command words.
    Operation,
    Icw2,
    Icw3,
    Icw4,
}

/// OCW2 commands, its bits 7..5.
mod ocw2 {
    pub const CLEAR_ROTATE_IN_AUTO_EOI: u8 = 0;
    pub const EOI: u8 = 1;
    pub const SPECIFIC_EOI: u8 = 3;
    pub const SET_ROTATE_IN_AUTO_EOI: u8 = 4;
    pub const ROTATE_ON_EOI: u8 = 5;
    pub const SET_PRIORITY: u8 = 6;
    pub const ROTATE_ON_SPECIFIC_EOI: u8 = 7;
}

/// One 8259A with the PIIX's edge/level control register in place of ICW1's LTIM bit.
///
/// A request on an edge-triggered input is latched by the rising edge and goes when it is
/// acknowledged or the line falls, as in the data sheet; on a level-triggered input it is the line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pic8259 {
    lines: u8,
    /// Requests latched by edges.
    edges: u8,
    in_service: u8,
    mask: u8,
    /// Edge/level control register: set bits are level-triggered.
    elcr: u8,
    elcr_writable: u8,
    vector_base: u8,
    /// Input with the lowest priority; 7 unless rotated.
    lowest: u8,
    expect: Expect,
    /// ICW1 bits 0 (ICW4 follows) and 1 (single).
    icw1: u8,
    /// Inputs with a slave behind them.
    cascade: u8,
    read_in_service: bool,
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_in_auto_eoi: bool,
    special_fully_nested: bool,
}

impl Pic8259 {
    /// A chip after reset: everything masked until it is initialised. `cascade` are the inputs wired
    /// to a slave, `elcr_writable` those whose trigger mode can be changed.
    pub fn new(cascade: u8, elcr_writable: u8) -> Self {
        Self {
            lines: 0,
            edges: 0,
            in_service: 0,
            mask: 0xff,
            elcr: 0,
            elcr_writable,
            vector_base: 0,
            lowest: 7,
            expect: Expect::Operation,
            icw1: 0,
            cascade,
            read_in_service: false,
            poll: false,
            special_mask: false,
            auto_eoi: false,
            rotate_in_auto_eoi: false,
            special_fully_nested: false,
        }
    }

    /// Power-on registers; the levels on the input lines stay, being others' outputs.
    pub fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::new(self.cascade, self.elcr_writable) };
    }

    /// Sets input `n` (0..8).
    pub fn set_line(&mut self, n: u8, level: bool) {
        let bit = 1 << (n & 7);
        if !level {
            self.lines &= !bit;
            self.edges &= !bit;
        } else if self.lines & bit == 0 {
            self.lines |= bit;
            self.edges |= bit;
        }
    }

    /// INTR output.
    pub fn intr(&self) -> bool {
        self.expect == Expect::Operation && self.highest().is_some()
    }

    /// Takes the request of highest priority, if there is one, into service.
    pub fn take(&mut self) -> Option<u8> {
        let n = self.highest()?;
        self.edges &= !(1 << n);
        if !self.auto_eoi {
            self.in_service |= 1 << n;
        } else if self.rotate_in_auto_eoi {
            self.lowest = n;
        }
        Some(n)
    }

    /// Vector of input `n`.
    pub fn vector(&self, n: u8) -> u8 {
        self.vector_base | n & 7
    }

    /// Whether a slave answers for input `n`.
    pub fn is_cascade(&self, n: u8) -> bool {
        self.cascade & 1 << n != 0
    }

    /// Reads the command port: IRR, ISR or a poll.
    pub fn read_command(&mut self) -> u8 {
        if self.poll {
            self.poll_byte()
        } else if self.read_in_service {
            self.in_service
        } else {
            self.requests()
        }
    }

    /// Reads the data port: IMR or a poll.
    pub fn read_data(&mut self) -> u8 {
        if self.poll { self.poll_byte() } else { self.mask }
    }

    /// Writes the command port: ICW1, OCW2 or OCW3.
    pub fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.begin_initialisation(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    /// Writes the data port: IMR or the next initialisation command word.
    pub fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Operation => self.mask = value,
            Expect::Icw2 => {
                self.vector_base = value & 0xf8;
                self.expect = if self.icw1 & 2 == 0 { Expect::Icw3 } else { self.after_icw3() };
            }
            // The wiring is the board's; what software claims about it changes nothing.
            Expect::Icw3 => self.expect = self.after_icw3(),
            Expect::Icw4 => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expect = Expect::Operation;
            }
        }
    }

    /// Edge/level control register.
    pub fn elcr(&self) -> u8 {
        self.elcr
    }

    /// Writes the edge/level control register.
    pub fn set_elcr(&mut self, value: u8) {
        self.elcr = value & self.elcr_writable;
    }

    fn after_icw3(&self) -> Expect {
        if self.icw1 & 1 != 0 { Expect::Icw4 } else { Expect::Operation }
    }

    fn requests(&self) -> u8 {
        (self.edges & !self.elcr) | (self.lines & self.elcr)
    }

    /// The input of highest priority in `set`.
    fn first(&self, set: u8) -> Option<u8> {
        let shift = (u32::from(self.lowest) + 1) & 7;
        let rotated = set.rotate_right(shift);
        (rotated != 0).then(|| ((rotated.trailing_zeros() + shift) & 7) as u8)
    }

    /// Position in the priority order, 0 being the highest.
    fn rank(&self, n: u8) -> u8 {
        n.wrapping_sub(self.lowest).wrapping_sub(1) & 7
    }

    /// The request that would be acknowledged now.
    fn highest(&self) -> Option<u8> {
        let n = self.first(self.requests() & !self.mask)?;
        let mut serving = self.in_service;
        if self.special_mask {
            serving &= !self.mask;
            // A level in service does not repeat itself even when special mask mode opens the others.
            return (self.in_service & 1 << n == 0 && self.outranks(n, serving)).then_some(n);
        }
        if self.special_fully_nested {
            serving &= !(self.cascade & 1 << n);
        }
        self.outranks(n, serving).then_some(n)
    }

    fn outranks(&self, n: u8, serving: u8) -> bool {
        self.first(serving).is_none_or(|s| self.rank(n) < self.rank(s))
    }

    fn poll_byte(&mut self) -> u8 {
        self.poll = false;
        self.take().map_or(0, |n| 0x80 | n)
    }

    fn begin_initialisation(&mut self, value: u8) {
        self.icw1 = value & 3;
        self.edges = 0;
        self.in_service = 0;
        self.mask = 0;
        self.lowest = 7;
        self.read_in_service = false;
        self.poll = false;
        self.special_mask = false;
        self.auto_eoi = false;
        self.rotate_in_auto_eoi = false;
        self.special_fully_nested = false;
        self.expect = Expect::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) {
        let n = value & 7;
        match value >> 5 {
            ocw2::CLEAR_ROTATE_IN_AUTO_EOI => self.rotate_in_auto_eoi = false,
            ocw2::SET_ROTATE_IN_AUTO_EOI => self.rotate_in_auto_eoi = true,
            ocw2::SET_PRIORITY => self.lowest = n,
            ocw2::SPECIFIC_EOI => self.in_service &= !(1 << n),
            ocw2::ROTATE_ON_SPECIFIC_EOI => {
                self.in_service &= !(1 << n);
                self.lowest = n;
            }
            command @ (ocw2::EOI | ocw2::ROTATE_ON_EOI) => self.end_highest(command == ocw2::ROTATE_ON_EOI),
            _ => {}
        }
    }

    fn end_highest(&mut self, rotate: bool) {
        let hidden = if self.special_mask { self.mask } else { 0 };
        if let Some(n) = self.first(self.in_service & !hidden) {
            self.in_service &= !(1 << n);
            if rotate {
                self.lowest = n;
            }
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x04 != 0 {
            self.poll = true;
        } else if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
    }
}
