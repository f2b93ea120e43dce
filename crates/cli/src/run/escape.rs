//! The escape key of the guest's terminal.

/// Ctrl-A.
const PREFIX: u8 = 1;

/// Splits what is typed into the guest's bytes and our own commands.
#[derive(Debug, Default)]
pub struct Escape {
    after_prefix: bool,
}

impl Escape {
    /// Takes one typed byte; gives what the guest gets. `Err` means that the user wants to leave.
    pub fn feed(&mut self, byte: u8, out: &mut impl Extend<u8>) -> Result<(), Leave> {
        if !std::mem::take(&mut self.after_prefix) {
            if byte == PREFIX {
                self.after_prefix = true;
            } else {
                out.extend([byte]);
            }
            return Ok(());
        }
        match byte {
            b'x' | b'X' => return Err(Leave),
            PREFIX => out.extend([PREFIX]),
            other => out.extend([PREFIX, other]),
        }
        Ok(())
    }
}

/// The user typed the escape sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leave;

#[cfg(test)]
mod tests {
    use super::*;

    fn type_in(text: &[u8]) -> (Vec<u8>, bool) {
        let (mut escape, mut out) = (Escape::default(), Vec::new());
        let left = text.iter().any(|&byte| escape.feed(byte, &mut out).is_err());
        (out, left)
    }

    #[test]
    fn sequences() {
        assert_eq!(type_in(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(type_in(b"a\x01xb"), (b"a".to_vec(), true));
        assert_eq!(type_in(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(type_in(b"\x01b"), (b"\x01b".to_vec(), false));
        assert_eq!(type_in(b"x\x01"), (b"x".to_vec(), false));
    }
}
