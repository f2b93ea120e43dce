//! Registers of a 16550A UART, without ports or an interrupt number.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use umbra_arch::VirtualTime;

/// Receiver FIFO size in bytes.
pub const FIFO_SIZE: usize = 16;
/// Input clock divided by 16: baud rate at divisor 1.
const BASE_BAUD: u64 = 115_200;

/// Interrupt enable register bits.
mod ier {
    pub const RECEIVED: u8 = 1 << 0;
    pub const THR_EMPTY: u8 = 1 << 1;
    pub const LINE_STATUS: u8 = 1 << 2;
    pub const MODEM_STATUS: u8 = 1 << 3;
}
/// Interrupt identification register values.
mod iir {
    pub const NONE: u8 = 0x1;
    pub const LINE_STATUS: u8 = 0x6;
    pub const RECEIVED: u8 = 0x4;
    pub const TIMEOUT: u8 = 0xc;
    pub const THR_EMPTY: u8 = 0x2;
    pub const MODEM_STATUS: u8 = 0x0;
    pub const FIFOS: u8 = 0xc0;
}
/// FIFO control register bits.
mod fcr {
    pub const ENABLE: u8 = 1 << 0;
    pub const CLEAR_RECEIVER: u8 = 1 << 1;
}
/// Line control register bits.
mod lcr {
    pub const DLAB: u8 = 1 << 7;
}
/// Modem control register bits.
mod mcr {
    pub const OUT2: u8 = 1 << 3;
    pub const LOOPBACK: u8 = 1 << 4;
    pub const ALL: u8 = 0x1f;
}
/// Line status register bits.
mod lsr {
    pub const DATA_READY: u8 = 1 << 0;
    pub const OVERRUN: u8 = 1 << 1;
    pub const THR_EMPTY: u8 = 1 << 5;
    pub const TRANSMITTER_EMPTY: u8 = 1 << 6;
}
/// Modem status register bits.
mod msr {
    pub const CTS: u8 = 1 << 4;
    pub const DSR: u8 = 1 << 5;
    pub const RI: u8 = 1 << 6;
    pub const DCD: u8 = 1 << 7;
    pub const LINES: u8 = 0xf0;
    pub const CHANGES: u8 = 0x0f;
}

/// A 16550A. A byte written is transmitted at once; reception has the FIFO's depth as backpressure.
///
/// Interrupt sources by priority: receiver line status (overrun), received data at the trigger level,
/// receive time-out (FIFO mode, four character times without traffic), transmitter holding register
/// empty, modem status. The THR-empty interrupt is an event: raised when the register becomes empty
/// *and when its enable bit is set while it is empty*; taken back by reading IIR when it is the one
/// reported, or by writing THR. The interrupt line is gated by OUT2, as on PC serial cards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Uart16550 {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    /// Low nibble: changes since MSR was read; high nibble: lines.
    msr: u8,
    thr_empty_event: bool,
    received: VecDeque<u8>,
    /// When the receive time-out interrupt comes, while bytes wait in the FIFO.
    timeout_at: Option<VirtualTime>,
    timed_out: bool,
    output: Vec<u8>,
}

impl Default for Uart16550 {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            divisor: 12,
            overrun: false,
            msr: msr::CTS | msr::DSR | msr::DCD,
            thr_empty_event: false,
            received: VecDeque::new(),
            timeout_at: None,
            timed_out: false,
            output: Vec::new(),
        }
    }
}

impl Uart16550 {
    /// A UART after reset that still owes `output` to the host.
    pub fn with_output(output: Vec<u8>) -> Self {
        Self { output, ..Self::default() }
    }

    /// Brings the receive time-out up to `now`.
    pub fn advance(&mut self, now: VirtualTime) {
        if self.timeout_at.is_some_and(|at| at <= now) {
            self.timeout_at = None;
            self.timed_out = true;
        }
    }

    /// When the interrupt line rises by a receive time-out.
    pub fn next_event(&self) -> Option<VirtualTime> {
        if self.irq() || self.ier & ier::RECEIVED == 0 || self.mcr & mcr::OUT2 == 0 {
            return None;
        }
        self.timeout_at
    }

    /// Interrupt line.
    pub fn irq(&self) -> bool {
        self.mcr & mcr::OUT2 != 0 && self.interrupt() != iir::NONE
    }

    /// Reads register `offset` (0..8).
    pub fn read(&mut self, now: VirtualTime, offset: u16) -> u8 {
        match offset & 7 {
            0 if self.lcr & lcr::DLAB != 0 => self.divisor as u8,
            0 => self.take_received(now),
            1 if self.lcr & lcr::DLAB != 0 => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => self.identify(),
            3 => self.lcr,
            4 => self.mcr,
            5 => self.line_status(),
            6 => {
                let value = self.msr;
                self.msr &= !msr::CHANGES;
                value
            }
            _ => self.scratch,
        }
    }

    /// Writes register `offset` (0..8).
    pub fn write(&mut self, now: VirtualTime, offset: u16, value: u8) {
        match offset & 7 {
            0 if self.lcr & lcr::DLAB != 0 => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(now, value),
            1 if self.lcr & lcr::DLAB != 0 => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            1 => self.set_interrupt_enable(value & 0x0f),
            2 => self.set_fifo_control(value),
            3 => self.lcr = value,
            4 => self.set_modem_control(value & mcr::ALL),
            5 | 6 => {}
            _ => self.scratch = value,
        }
    }

    /// Whether the receiver has room and is connected to the line.
    pub fn can_receive(&self) -> bool {
        self.mcr & mcr::LOOPBACK == 0 && self.received.len() < self.receiver_size()
    }

    /// A byte arrives on the line. Without room it is lost and the overrun bit set, as on a real line.
    pub fn receive(&mut self, now: VirtualTime, byte: u8) {
        if self.mcr & mcr::LOOPBACK == 0 {
            self.push_received(now, byte);
        }
    }

    /// Bytes transmitted since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    fn fifos_enabled(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    fn receiver_size(&self) -> usize {
        if self.fifos_enabled() { FIFO_SIZE } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        if self.fifos_enabled() { [1, 4, 8, 14][usize::from(self.fcr >> 6)] } else { 1 }
    }

    /// Start, 5 to 8 data, parity and stop bits, four times over.
    fn timeout_ns(&self) -> u64 {
        let bits = 2 + 5 + u64::from(self.lcr & 3) + u64::from(self.lcr >> 3 & 1) + u64::from(self.lcr >> 2 & 1);
        4 * bits * u64::from(self.divisor.max(1)) * 1_000_000_000 / BASE_BAUD
    }

    /// The interrupt of highest priority, as IIR shows it.
    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(ier::LINE_STATUS) && self.overrun {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED) && self.received.len() >= self.trigger_level() {
            iir::RECEIVED
        } else if enabled(ier::RECEIVED) && self.timed_out {
            iir::TIMEOUT
        } else if enabled(ier::THR_EMPTY) && self.thr_empty_event {
            iir::THR_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.msr & msr::CHANGES != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn identify(&mut self) -> u8 {
        let id = self.interrupt();
        if id == iir::THR_EMPTY {
            self.thr_empty_event = false;
        }
        id | if self.fifos_enabled() { iir::FIFOS } else { 0 }
    }

    fn line_status(&mut self) -> u8 {
        let mut value = lsr::THR_EMPTY | lsr::TRANSMITTER_EMPTY;
        if !self.received.is_empty() {
            value |= lsr::DATA_READY;
        }
        if std::mem::take(&mut self.overrun) {
            value |= lsr::OVERRUN;
        }
        value
    }

    fn set_interrupt_enable(&mut self, value: u8) {
        if value & !self.ier & ier::THR_EMPTY != 0 {
            self.thr_empty_event = true;
        }
        self.ier = value;
    }

    fn set_fifo_control(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & fcr::ENABLE != 0;
        if toggled || value & fcr::CLEAR_RECEIVER != 0 {
            self.received.clear();
            self.timeout_at = None;
            self.timed_out = false;
        }
        self.fcr = if value & fcr::ENABLE != 0 { value & 0xc9 } else { 0 };
    }

    fn set_modem_control(&mut self, value: u8) {
        self.mcr = value;
        let lines = if value & mcr::LOOPBACK != 0 {
            // DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
            (value & 1) << 5 | (value & 2) << 3 | (value & 4) << 4 | (value & 8) << 4
        } else {
            msr::CTS | msr::DSR | msr::DCD
        };
        let changed = lines ^ self.msr;
        let mut changes = (changed & (msr::CTS | msr::DSR | msr::DCD)) >> 4;
        // The ring indicator reports its trailing edge only.
        changes |= (changed & self.msr & msr::RI) >> 4;
        self.msr = lines & msr::LINES | (self.msr & msr::CHANGES) | changes;
    }

    fn transmit(&mut self, now: VirtualTime, byte: u8) {
        if self.mcr & mcr::LOOPBACK != 0 {
            self.push_received(now, byte);
        } else {
            self.output.push(byte);
        }
        self.thr_empty_event = true;
    }

    fn push_received(&mut self, now: VirtualTime, byte: u8) {
        if self.received.len() >= self.receiver_size() {
            self.overrun = true;
            if !self.fifos_enabled() {
                self.received.clear();
                self.received.push_back(byte);
            }
            return;
        }
        self.received.push_back(byte);
        self.restart_timeout(now);
    }

    fn take_received(&mut self, now: VirtualTime) -> u8 {
        let byte = self.received.pop_front().unwrap_or(0);
        self.timed_out = false;
        self.restart_timeout(now);
        byte
    }

    fn restart_timeout(&mut self, now: VirtualTime) {
        let waiting = self.fifos_enabled() && !self.received.is_empty();
        self.timeout_at = waiting.then(|| now.plus(self.timeout_ns()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: VirtualTime = VirtualTime(1_000);

    fn uart() -> Uart16550 {
        let mut u = Uart16550::default();
        u.write(NOW, 4, mcr::OUT2);
        u
    }

    #[test]
    fn power_on_values_and_scratch() {
        let mut u = Uart16550::default();
        let expected = [0, 0, 0x01, 0, 0, 0x60, 0xb0, 0];
        for (offset, value) in expected.into_iter().enumerate() {
            assert_eq!(u.read(NOW, offset as u16), value, "register {offset}");
        }
        for value in [0x5a, 0xa5] {
            u.write(NOW, 7, value);
            assert_eq!(u.read(NOW, 7), value);
        }
    }

    #[test]
    fn linux_probe_of_a_16550a() {
        let mut u = Uart16550::default();
        u.write(NOW, 1, 0xff);
        assert_eq!(u.read(NOW, 1), 0x0f);
        u.write(NOW, 1, 0);
        assert_eq!(u.read(NOW, 1), 0);
        u.write(NOW, 4, mcr::LOOPBACK | 0x0a);
        assert_eq!(u.read(NOW, 6) & 0xf0, 0x90);
        u.write(NOW, 2, fcr::ENABLE);
        assert_eq!(u.read(NOW, 2) >> 6, 3);
    }

    #[test]
    fn divisor_latch_hides_data_and_enable() {
        let mut u = uart();
        u.write(NOW, 3, 0x83);
        u.write(NOW, 0, 0x34);
        u.write(NOW, 1, 0x12);
        assert_eq!((u.read(NOW, 0), u.read(NOW, 1)), (0x34, 0x12));
        u.write(NOW, 3, 0x03);
        assert_eq!(u.read(NOW, 1), 0);
        assert!(u.take_output().is_empty());
    }

    #[test]
    fn thr_empty_interrupt_is_an_event() {
        let mut u = uart();
        assert!(!u.irq());
        u.write(NOW, 1, ier::THR_EMPTY);
        assert!(u.irq(), "enabling with the register empty raises it");
        assert_eq!(u.read(NOW, 2), iir::THR_EMPTY);
        assert!(!u.irq(), "reading IIR takes it back");
        assert_eq!(u.read(NOW, 2), iir::NONE);
        u.write(NOW, 1, ier::THR_EMPTY);
        assert!(!u.irq(), "writing the same again is no event");
        u.write(NOW, 0, b'x');
        assert!(u.irq(), "the byte left at once");
        assert_eq!(u.take_output(), b"x");
        u.write(NOW, 1, 0);
        assert!(!u.irq());
        u.write(NOW, 1, ier::THR_EMPTY);
        assert!(u.irq());
    }

    #[test]
    fn iir_read_of_a_higher_interrupt_keeps_thr_empty() {
        let mut u = uart();
        u.write(NOW, 1, ier::THR_EMPTY | ier::RECEIVED);
        u.receive(NOW, b'a');
        assert_eq!(u.read(NOW, 2), iir::RECEIVED);
        assert_eq!(u.read(NOW, 0), b'a');
        assert_eq!(u.read(NOW, 2), iir::THR_EMPTY);
        assert_eq!(u.read(NOW, 2), iir::NONE);
    }

    #[test]
    fn trigger_levels() {
        for (code, level) in [(0u8, 1usize), (1, 4), (2, 8), (3, 14)] {
            let mut u = uart();
            u.write(NOW, 1, ier::RECEIVED);
            u.write(NOW, 2, fcr::ENABLE | code << 6);
            for n in 1..=FIFO_SIZE {
                assert!(u.can_receive());
                u.receive(NOW, n as u8);
                assert_eq!(u.irq(), n >= level, "level {level}, {n} bytes");
            }
            assert!(!u.can_receive());
            for n in 1..=FIFO_SIZE {
                assert_eq!(u.read(NOW, 0), n as u8);
            }
            assert!(!u.irq());
            assert_eq!(u.read(NOW, 5), 0x60);
        }
    }

    #[test]
    fn receive_timeout_after_four_characters() {
        let mut u = uart();
        u.write(NOW, 3, 0x83);
        u.write(NOW, 0, 1);
        u.write(NOW, 1, 0);
        u.write(NOW, 3, 0x03);
        u.write(NOW, 1, ier::RECEIVED);
        u.write(NOW, 2, fcr::ENABLE | 0xc0);
        u.receive(NOW, b'q');
        // 8N1 at 115200 baud: 40 bits in 347.2 microseconds.
        let due = VirtualTime(NOW.0 + 347_222);
        assert_eq!(u.next_event(), Some(due));
        u.advance(VirtualTime(due.0 - 1));
        assert!(!u.irq());
        u.advance(due);
        assert!(u.irq());
        assert_eq!(u.next_event(), None);
        assert_eq!(u.read(due, 2) & 0x0f, iir::TIMEOUT);
        assert!(u.irq(), "only a read of the data ends it");
        assert_eq!(u.read(due, 0), b'q');
        assert!(!u.irq());
    }

    #[test]
    fn overrun() {
        let mut u = uart();
        u.write(NOW, 1, ier::LINE_STATUS);
        u.receive(NOW, 1);
        u.receive(NOW, 2);
        assert_eq!(u.read(NOW, 2), iir::LINE_STATUS);
        assert_eq!(u.read(NOW, 5), 0x63);
        assert_eq!(u.read(NOW, 5), 0x61);
        assert_eq!(u.read(NOW, 0), 2, "without FIFO the newer byte stays");
    }

    #[test]
    fn loopback() {
        let mut u = uart();
        u.write(NOW, 4, mcr::LOOPBACK);
        u.read(NOW, 6);
        assert!(!u.can_receive());
        u.write(NOW, 0, 0x42);
        assert!(u.take_output().is_empty());
        assert_eq!(u.read(NOW, 0), 0x42);
        for (control, lines) in [(1u8, msr::DSR), (2, msr::CTS), (4, msr::RI), (8, msr::DCD)] {
            u.write(NOW, 4, mcr::LOOPBACK | control);
            assert_eq!(u.read(NOW, 6) & 0xf0, lines);
        }
        u.write(NOW, 4, mcr::LOOPBACK | 4);
        u.read(NOW, 6);
        u.write(NOW, 4, mcr::LOOPBACK);
        assert_eq!(u.read(NOW, 6), 0x04, "trailing edge of RI");
    }

    #[test]
    fn out2_gates_the_line() {
        let mut u = Uart16550::default();
        u.write(NOW, 1, ier::THR_EMPTY);
        assert!(!u.irq());
        u.write(NOW, 4, mcr::OUT2);
        assert!(u.irq());
    }
}
