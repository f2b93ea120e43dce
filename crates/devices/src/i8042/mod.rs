//! 8042 keyboard controller with a PS/2 keyboard and mouse.
//!
//! Ports: 60h data, 64h status (read) and command (write). The controller has one output buffer; a
//! byte in it raises IRQ 1, or IRQ 12 if it came from the mouse. Its own replies appear at once; bytes
//! from the devices come one by one over a serial line, which takes [`BYTE_TIME`] each, so that every
//! byte makes an edge on the interrupt line.

mod keyboard;
mod mouse;

use self::keyboard::{Keyboard, Translator};
use self::mouse::Mouse;
use crate::bytes::ByteFile;
use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Nanoseconds between two bytes from a device (real ones take a millisecond).
pub const BYTE_TIME: u64 = 20_000;

/// Status register bits.
mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const COMMAND: u8 = 1 << 3;
    pub const NOT_LOCKED: u8 = 1 << 4;
    pub const OUTPUT_IS_MOUSE: u8 = 1 << 5;
}
/// Command byte (controller RAM byte 0) bits.
mod control {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const MOUSE_INTERRUPT: u8 = 1 << 1;
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_OFF: u8 = 1 << 4;
    pub const MOUSE_OFF: u8 = 1 << 5;
    pub const TRANSLATE: u8 = 1 << 6;
}
/// Output port bits.
mod output_port {
    pub const NOT_RESET: u8 = 1 << 0;
    pub const A20: u8 = 1 << 1;
    pub const KEYBOARD_FULL: u8 = 1 << 4;
    pub const MOUSE_FULL: u8 = 1 << 5;
}

/// What the next byte written to port 60h is for, if not the keyboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Parameter {
    Ram(u8),
    OutputPort,
    KeyboardBuffer,
    MouseBuffer,
    Mouse,
}

/// A byte in the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    byte: u8,
    mouse: bool,
}

/// The keyboard controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct I8042 {
    keyboard: Keyboard,
    mouse: Mouse,
    translator: Translator,
    ram: ByteFile,
    output_port: u8,
    parameter: Option<Parameter>,
    last_was_command: bool,
    output: Option<Output>,
    /// A reply of the controller that waits for the buffer.
    reply: Option<Output>,
    /// What port 60h shows when the buffer is empty.
    last_byte: u8,
    /// When the line from the devices is free for the next byte.
    line_free_at: VirtualTime,
    now: VirtualTime,
    reset_requested: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        let mut ram = ByteFile::default();
        // As a BIOS leaves it.
        ram.set(0, control::TRANSLATE | control::SYSTEM | control::KEYBOARD_INTERRUPT | control::MOUSE_OFF);
        Self {
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
            translator: Translator::default(),
            ram,
            output_port: output_port::NOT_RESET | output_port::A20,
            parameter: None,
            last_was_command: false,
            output: None,
            reply: None,
            last_byte: 0,
            line_free_at: VirtualTime(0),
            now: VirtualTime(0),
            reset_requested: false,
        }
    }
}

impl I8042 {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x60, 0x64];

    /// Level of IRQ 1, the keyboard's.
    pub fn irq1(&self) -> bool {
        self.output.is_some_and(|output| !output.mouse) && self.control() & control::KEYBOARD_INTERRUPT != 0
    }

    /// Level of IRQ 12, the mouse's.
    pub fn irq12(&self) -> bool {
        self.output.is_some_and(|output| output.mouse) && self.control() & control::MOUSE_INTERRUPT != 0
    }

    /// Whether this gate lets A20 through.
    pub fn a20(&self) -> bool {
        self.output_port & output_port::A20 != 0
    }

    /// Whether the guest asked for a reset since the last call.
    pub fn take_reset_request(&mut self) -> bool {
        std::mem::take(&mut self.reset_requested)
    }

    /// The user makes the keyboard send these bytes, whole sequences of scan code set 2. False if there
    /// is no room or the keyboard is off; nothing is taken then.
    pub fn receive_keys(&mut self, now: VirtualTime, codes: &[u8]) -> bool {
        self.advance(now);
        let taken = self.keyboard.type_codes(codes);
        self.occupy_line();
        taken
    }

    /// The user moves the mouse (right and up positive) or changes buttons (bit 0 left, 1 right, 2
    /// middle). False if the mouse is off or there is no room.
    pub fn receive_mouse(&mut self, now: VirtualTime, dx: i16, dy: i16, wheel: i8, buttons: u8) -> bool {
        self.advance(now);
        let taken = self.mouse.report(dx, dy, wheel, buttons);
        self.occupy_line();
        taken
    }

    fn control(&self) -> u8 {
        self.ram.get(0)
    }

    fn keyboard_can_send(&self) -> bool {
        self.keyboard.has_output() && self.control() & control::KEYBOARD_OFF == 0
    }

    fn mouse_can_send(&self) -> bool {
        self.mouse.has_output() && self.control() & control::MOUSE_OFF == 0
    }

    /// A device byte that is on its way now arrives no sooner than a byte's time from now.
    fn occupy_line(&mut self) {
        self.line_free_at = self.line_free_at.max(self.now.plus(BYTE_TIME));
    }

    fn fill_output(&mut self) {
        if self.output.is_some() {
            return;
        }
        if let Some(reply) = self.reply.take() {
            self.output = Some(reply);
            return;
        }
        if self.now < self.line_free_at {
            return;
        }
        while self.output.is_none() && self.keyboard_can_send() {
            let Some(byte) = self.keyboard.pop() else { return };
            let byte =
                if self.control() & control::TRANSLATE != 0 { self.translator.translate(byte) } else { Some(byte) };
            self.output = byte.map(|byte| Output { byte, mouse: false });
        }
        if self.output.is_none() && self.mouse_can_send() {
            self.output = self.mouse.pop().map(|byte| Output { byte, mouse: true });
        }
    }

    fn reply(&mut self, byte: u8) {
        self.reply = Some(Output { byte, mouse: false });
    }

    fn read_status(&self) -> u8 {
        let mut value = status::NOT_LOCKED;
        if let Some(output) = self.output {
            value |= status::OUTPUT_FULL;
            if output.mouse {
                value |= status::OUTPUT_IS_MOUSE;
            }
        }
        if self.control() & control::SYSTEM != 0 {
            value |= status::SYSTEM;
        }
        if self.last_was_command {
            value |= status::COMMAND;
        }
        value
    }

    fn read_data(&mut self) -> u8 {
        if let Some(output) = self.output.take() {
            self.last_byte = output.byte;
            self.occupy_line();
        }
        self.last_byte
    }

    fn write_data(&mut self, byte: u8) {
        self.last_was_command = false;
        match self.parameter.take() {
            None => {
                self.set_control(control::KEYBOARD_OFF, false);
                self.keyboard.write(byte);
                self.occupy_line();
            }
            Some(Parameter::Ram(index)) => self.ram.set(index, byte),
            Some(Parameter::OutputPort) => self.write_output_port(byte),
            Some(Parameter::KeyboardBuffer) => self.reply(byte),
            Some(Parameter::MouseBuffer) => self.reply = Some(Output { byte, mouse: true }),
            Some(Parameter::Mouse) => {
                self.set_control(control::MOUSE_OFF, false);
                self.mouse.write(byte);
                self.occupy_line();
            }
        }
    }

    fn write_command(&mut self, command: u8) {
        self.last_was_command = true;
        self.parameter = None;
        match command {
            0x20..=0x3f => self.reply(self.ram.get(command & 0x1f)),
            0x60..=0x7f => self.parameter = Some(Parameter::Ram(command & 0x1f)),
            0xa4 => self.reply(0xf1),
            0xa7 => self.set_control(control::MOUSE_OFF, true),
            0xa8 => self.set_control(control::MOUSE_OFF, false),
            0xa9 | 0xab => self.reply(0x00),
            0xaa => {
                self.set_control(control::SYSTEM, true);
                self.reply(0x55);
            }
            0xad => self.set_control(control::KEYBOARD_OFF, true),
            0xae => self.set_control(control::KEYBOARD_OFF, false),
            0xc0 => self.reply(0x80),
            0xd0 => self.reply(self.read_output_port()),
            0xd1 => self.parameter = Some(Parameter::OutputPort),
            0xd2 => self.parameter = Some(Parameter::KeyboardBuffer),
            0xd3 => self.parameter = Some(Parameter::MouseBuffer),
            0xd4 => self.parameter = Some(Parameter::Mouse),
            0xe0 => self.reply(0x00),
            // Pulses the output port's low bits that are 0 here; bit 0 is the reset line.
            0xf0..=0xff => self.reset_requested |= command & 1 == 0,
            _ => {}
        }
    }

    fn set_control(&mut self, bit: u8, on: bool) {
        let value = if on { self.control() | bit } else { self.control() & !bit };
        self.ram.set(0, value);
    }

    fn read_output_port(&self) -> u8 {
        self.output_port
            | if self.irq1() { output_port::KEYBOARD_FULL } else { 0 }
            | if self.irq12() { output_port::MOUSE_FULL } else { 0 }
    }

    fn write_output_port(&mut self, value: u8) {
        self.reset_requested |= value & output_port::NOT_RESET == 0;
        self.output_port = value & output_port::A20 | output_port::NOT_RESET;
    }
}

impl Device for I8042 {
    fn advance(&mut self, now: VirtualTime) {
        self.now = self.now.max(now);
        self.fill_output();
    }
    fn next_event(&self) -> Option<VirtualTime> {
        let waiting = self.output.is_none() && (self.keyboard_can_send() || self.mouse_can_send());
        waiting.then_some(self.line_free_at)
    }
    fn reset(&mut self) {
        *self = Self { now: self.now, line_free_at: self.now, ..Self::default() };
    }
}

impl PortDevice for I8042 {
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        self.advance(now);
        let value = regmap::read_bytes(port, width, |port| match port {
            0x60 => self.read_data(),
            0x64 => self.read_status(),
            _ => 0xff,
        });
        self.fill_output();
        value
    }
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        self.advance(now);
        regmap::write_bytes(port, width, value, |port, byte| match port {
            0x60 => self.write_data(byte),
            0x64 => self.write_command(byte),
            _ => {}
        });
        self.fill_output();
    }
}

#[cfg(test)]
mod tests;
