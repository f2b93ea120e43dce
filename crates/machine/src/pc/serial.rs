//! The first serial port's output on its way to the host, and the string somebody waits for.

use serde::{Deserialize, Serialize};

/// Output collected since the host last took it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SerialOutput {
    bytes: Vec<u8>,
    debug: Vec<u8>,
    expected: Vec<u8>,
    /// The last bytes sent, one fewer than `expected` has: a match may span two writes.
    tail: Vec<u8>,
}

impl SerialOutput {
    /// Looks for `text` from now on; an empty one is never found.
    pub fn expect(&mut self, text: &[u8]) {
        self.expected = text.to_vec();
        self.tail.clear();
    }

    /// Takes what was sent since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Takes what was written to the debug console since the last call.
    pub fn take_debug(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.debug)
    }

    /// Whether anything waits to be taken.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.debug.is_empty()
    }

    /// Adds output; says whether the expected string is complete with it.
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        self.bytes.extend_from_slice(bytes);
        if self.expected.is_empty() {
            return false;
        }
        self.tail.extend_from_slice(bytes);
        let found = self.tail.windows(self.expected.len()).any(|window| window == self.expected);
        let keep = self.expected.len() - 1;
        self.tail.drain(..self.tail.len().saturating_sub(keep));
        found
    }

    pub(super) fn push_debug(&mut self, bytes: &[u8]) {
        self.debug.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn match_may_span_writes_of_any_size() {
        let text = b"xx@@@INIT\n";
        for chunk in 1..=text.len() {
            let mut serial = SerialOutput::default();
            serial.expect(b"@@INIT");
            let found = text.chunks(chunk).map(|bytes| serial.push(bytes)).filter(|found| *found).count();
            assert_eq!(found, 1, "chunks of {chunk}");
            assert_eq!(serial.take(), text);
        }
    }

    #[test]
    fn nothing_expected_is_nothing_found() {
        let mut serial = SerialOutput::default();
        assert!(!serial.push(b"abc"));
        serial.expect(b"abcd");
        assert!(!serial.push(b"abc"));
        assert!(serial.push(b"d"));
    }
}
