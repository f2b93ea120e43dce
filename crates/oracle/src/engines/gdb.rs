//! A client of gdb's remote serial protocol, as much of it as reading a stopped guest needs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A stub that doesn't answer as expected.
#[derive(Debug, thiserror::Error)]
pub enum GdbError {
    /// The connection.
    #[error("the gdb stub: {0}")]
    Io(#[from] std::io::Error),
    /// Its answer.
    #[error("the gdb stub refuses {0}")]
    Refused(String),
}

/// A connection to a stub.
pub struct Gdb {
    stream: UnixStream,
}

impl Gdb {
    /// Connects as soon as the stub listens.
    ///
    /// # Errors
    /// When it doesn't within `patience`, which is also how long an answer may take.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self, GdbError> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(patience))?;
                    return Ok(Self { stream });
                }
                Err(error) if start.elapsed() > patience => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Stops before the instruction at a linear address.
    ///
    /// # Errors
    /// [`GdbError`].
    pub fn break_at(&mut self, address: u64) -> Result<(), GdbError> {
        self.expect_ok(&format!("Z1,{address:x},1"))
    }

    /// Runs until a breakpoint; false if the guest is gone.
    ///
    /// # Errors
    /// [`GdbError`].
    pub fn go_on(&mut self) -> Result<bool, GdbError> {
        self.send("c")?;
        // W and X: the process ended; without them the connection does.
        match self.receive() {
            Ok(answer) => Ok(!answer.starts_with(['W', 'X'])),
            Err(GdbError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(GdbError::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All registers, as bytes.
    ///
    /// # Errors
    /// [`GdbError`].
    pub fn registers(&mut self) -> Result<Vec<u8>, GdbError> {
        self.bytes("g")
    }

    /// Memory is addressed physically from now on.
    ///
    /// # Errors
    /// [`GdbError`].
    pub fn physical_memory(&mut self) -> Result<(), GdbError> {
        self.expect_ok("Qqemu.PhyMemMode:1")
    }

    /// Reads memory.
    ///
    /// # Errors
    /// [`GdbError`].
    pub fn read(&mut self, address: u64, bytes: u64) -> Result<Vec<u8>, GdbError> {
        let mut all = Vec::new();
        while (all.len() as u64) < bytes {
            let at = address + all.len() as u64;
            let part = (bytes - all.len() as u64).min(1024);
            all.extend(self.bytes(&format!("m{at:x},{part:x}"))?);
        }
        Ok(all)
    }

    fn bytes(&mut self, command: &str) -> Result<Vec<u8>, GdbError> {
        self.send(command)?;
        let answer = self.receive()?;
        let pair = |n: usize| answer.get(n..n + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = (0..answer.len()).step_by(2).map(pair).collect();
        bytes.filter(|bytes| !bytes.is_empty()).ok_or_else(|| GdbError::Refused(command.into()))
    }

    fn expect_ok(&mut self, command: &str) -> Result<(), GdbError> {
        self.send(command)?;
        if self.receive()? == "OK" { Ok(()) } else { Err(GdbError::Refused(command.into())) }
    }

    fn send(&mut self, command: &str) -> Result<(), GdbError> {
        let sum = command.bytes().fold(0u8, u8::wrapping_add);
        Ok(self.stream.write_all(format!("${command}#{sum:02x}").as_bytes())?)
    }

    fn byte(&mut self) -> Result<u8, GdbError> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    /// The next packet's contents; acknowledges it.
    fn receive(&mut self) -> Result<String, GdbError> {
        while self.byte()? != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte()? {
                b'#' => break,
                byte => text.push(char::from(byte)),
            }
        }
        self.byte()?;
        self.byte()?;
        self.stream.write_all(b"+")?;
        Ok(text)
    }
}
