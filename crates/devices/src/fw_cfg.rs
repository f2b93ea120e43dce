//! The firmware configuration device: named blobs from the host for the guest's firmware, with the
//! selector, data and DMA ports that SeaBIOS, OVMF and Linux know.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use umbra_arch::{AccessWidth, VirtualTime};

/// Well-known keys.
pub mod key {
    /// "QEMU", which is how guests recognise the interface.
    pub const SIGNATURE: u16 = 0x0000;
    /// Features: bit 0 the ports, bit 1 DMA.
    pub const ID: u16 = 0x0001;
    /// RAM size, 8 bytes.
    pub const RAM_SIZE: u16 = 0x0003;
    /// Number of CPUs at start, 2 bytes.
    pub const CPUS: u16 = 0x0005;
    /// Largest number of CPUs, 2 bytes.
    pub const MAX_CPUS: u16 = 0x000f;
    /// Directory of files.
    pub const FILE_DIRECTORY: u16 = 0x0019;
    /// First file.
    pub const FIRST_FILE: u16 = 0x0020;
}

const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const DMA_HIGH: u16 = 0x514;
const DMA_LOW: u16 = 0x518;

/// Bits of a selector that tell items apart; bit 14 once meant writing.
const KEY_MASK: u16 = 0xbfff;
/// Longest file name, without its terminating zero.
const NAME_LENGTH: usize = 55;

/// Bits of a DMA request's control word.
mod dma {
    pub const ERROR: u32 = 1 << 0;
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}

/// Why a file cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// The directory has no room for the name.
    #[error("firmware file name `{0}` is longer than 55 bytes; choose a shorter one")]
    NameTooLong(String),
    /// A file of this name exists.
    #[error("firmware file `{0}` was given twice; give it once")]
    Duplicate(String),
}

/// Guest-physical memory as a DMA device reaches it. False if the range is not RAM; nothing is
/// transferred then.
pub trait DmaMemory {
    /// Reads guest memory at `gpa`.
    fn read(&self, gpa: u64, data: &mut [u8]) -> bool;
    /// Writes guest memory at `gpa`.
    fn write(&mut self, gpa: u64, data: &[u8]) -> bool;
}

/// The device at ports 510h to 51Bh. Items read beyond their end give zeros.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    files: Vec<String>,
    selected: u16,
    position: u32,
    dma_high: u32,
    dma_request: Option<u64>,
}

impl Default for FwCfg {
    fn default() -> Self {
        Self::new()
    }
}

impl FwCfg {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x510, 0x511, 0x514, 0x515, 0x516, 0x517, 0x518, 0x519, 0x51a, 0x51b];

    /// A device with signature, features and an empty directory.
    pub fn new() -> Self {
        let mut f = Self {
            items: BTreeMap::new(),
            files: Vec::new(),
            selected: 0,
            position: 0,
            dma_high: 0,
            dma_request: None,
        };
        f.set_item(key::SIGNATURE, b"QEMU".to_vec());
        f.set_item(key::ID, 3u32.to_le_bytes().to_vec());
        f.update_directory();
        f
    }

    /// Sets the contents of a numbered item.
    pub fn set_item(&mut self, key: u16, data: Vec<u8>) {
        self.items.insert(key & KEY_MASK, data);
    }

    /// Adds a file, such as `etc/e820`, and returns its key.
    ///
    /// # Errors
    /// If the name is too long or taken.
    pub fn add_file(&mut self, name: &str, data: Vec<u8>) -> Result<u16, FwCfgError> {
        if name.len() > NAME_LENGTH {
            return Err(FwCfgError::NameTooLong(name.into()));
        }
        if self.files.iter().any(|file| file == name) {
            return Err(FwCfgError::Duplicate(name.into()));
        }
        let key = key::FIRST_FILE + self.files.len() as u16;
        self.files.push(name.into());
        self.set_item(key, data);
        self.update_directory();
        Ok(key)
    }

    /// The guest-physical address of a DMA request that the guest has just made; hand the device its
    /// memory with [`run_dma`](Self::run_dma) then.
    pub fn take_dma_request(&mut self) -> Option<u64> {
        self.dma_request.take()
    }

    /// Carries out the DMA request at `gpa`: big-endian control, length and address. The result goes
    /// into the control word: 0, or the error bit.
    pub fn run_dma(&mut self, gpa: u64, memory: &mut dyn DmaMemory) {
        let mut request = [0; 16];
        if !memory.read(gpa, &mut request) {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, address @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if control & dma::SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let done = if control & dma::READ != 0 {
            self.copy_to(memory, u64::from_be_bytes(address), length)
        } else if control & dma::SKIP != 0 {
            self.position = self.position.saturating_add(length);
            true
        } else {
            control & dma::WRITE == 0
        };
        memory.write(gpa, &if done { 0 } else { dma::ERROR }.to_be_bytes());
    }

    fn copy_to(&mut self, memory: &mut dyn DmaMemory, address: u64, length: u32) -> bool {
        let mut chunk = [0; 4096];
        let mut done = 0u32;
        while done < length {
            let size = (length - done).min(chunk.len() as u32);
            let Some(at) = address.checked_add(done.into()) else { return false };
            let piece = &mut chunk[..size as usize];
            piece.fill_with(|| self.next_byte());
            if !memory.write(at, piece) {
                return false;
            }
            done += size;
        }
        true
    }

    fn select(&mut self, key: u16) {
        self.selected = key & KEY_MASK;
        self.position = 0;
    }

    fn next_byte(&mut self) -> u8 {
        let byte = self.items.get(&self.selected).and_then(|item| item.get(self.position as usize));
        self.position = self.position.saturating_add(1);
        byte.copied().unwrap_or(0)
    }

    /// Number of files, then size, key and zero-padded name of each, numbers big-endian.
    fn update_directory(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, name) in (key::FIRST_FILE..).zip(&self.files) {
            let size = self.items.get(&key).map_or(0, Vec::len) as u32;
            directory.extend(size.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0, 0]);
            let mut field = [0; NAME_LENGTH + 1];
            field[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(field);
        }
        self.set_item(key::FILE_DIRECTORY, directory);
    }
}

impl Device for FwCfg {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        self.select(0);
        self.dma_high = 0;
        self.dma_request = None;
    }
}

impl PortDevice for FwCfg {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        match (port, width) {
            (DATA, AccessWidth::Byte) => self.next_byte().into(),
            (DMA_HIGH, AccessWidth::Dword) => u32::from_le_bytes(*b"QEMU"),
            (DMA_LOW, AccessWidth::Dword) => u32::from_le_bytes(*b" CFG"),
            _ => 0,
        }
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        match (port, width) {
            (SELECTOR, AccessWidth::Word) => self.select(value as u16),
            (DMA_HIGH, AccessWidth::Dword) => self.dma_high = value.swap_bytes(),
            (DMA_LOW, AccessWidth::Dword) => {
                let high = std::mem::take(&mut self.dma_high);
                self.dma_request = Some(u64::from(high) << 32 | u64::from(value.swap_bytes()));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak;
    use proptest::prelude::*;

    const NOW: VirtualTime = VirtualTime(0);

    struct Ram(Vec<u8>);

    impl DmaMemory for Ram {
        fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
            let Some(source) = usize::try_from(gpa).ok().and_then(|at| self.0.get(at..at.checked_add(data.len())?))
            else {
                return false;
            };
            data.copy_from_slice(source);
            true
        }
        fn write(&mut self, gpa: u64, data: &[u8]) -> bool {
            let Some(place) = usize::try_from(gpa).ok().and_then(|at| self.0.get_mut(at..at.checked_add(data.len())?))
            else {
                return false;
            };
            place.copy_from_slice(data);
            true
        }
    }

    fn item(f: &mut FwCfg, key: u16, length: usize) -> Vec<u8> {
        f.port_write(NOW, SELECTOR, AccessWidth::Word, key.into());
        (0..length).map(|_| f.port_read(NOW, DATA, AccessWidth::Byte) as u8).collect()
    }

    fn run(f: &mut FwCfg, ram: &mut Ram, control: u32, length: u32, address: u64) -> u32 {
        ram.0[0x100..0x104].copy_from_slice(&control.to_be_bytes());
        ram.0[0x104..0x108].copy_from_slice(&length.to_be_bytes());
        ram.0[0x108..0x110].copy_from_slice(&address.to_be_bytes());
        f.port_write(NOW, DMA_LOW, AccessWidth::Dword, 0x100u32.swap_bytes());
        let gpa = f.take_dma_request().unwrap();
        f.run_dma(gpa, ram);
        u32::from_be_bytes(ram.0[0x100..0x104].try_into().unwrap())
    }

    #[test]
    fn items_and_directory() {
        let mut f = FwCfg::new();
        assert_eq!(item(&mut f, key::SIGNATURE, 6), b"QEMU\0\0");
        assert_eq!(item(&mut f, key::ID, 4), [3, 0, 0, 0]);
        assert_eq!(item(&mut f, 0x1234, 2), [0, 0]);
        assert_eq!(f.add_file("etc/a", vec![1, 2, 3]), Ok(0x20));
        assert_eq!(f.add_file("opt/b", vec![9; 300]), Ok(0x21));
        let directory = item(&mut f, key::FILE_DIRECTORY, 4 + 128);
        assert_eq!(directory[..16], [0, 0, 0, 2, 0, 0, 0, 3, 0, 0x20, 0, 0, b'e', b't', b'c', b'/']);
        assert_eq!(directory[68..76], [0, 0, 1, 44, 0, 0x21, 0, 0]);
        assert_eq!(item(&mut f, 0x20, 4), [1, 2, 3, 0]);
        assert_eq!(f.add_file("etc/a", vec![]), Err(FwCfgError::Duplicate("etc/a".into())));
        let long = "x".repeat(56);
        assert_eq!(f.add_file(&long, vec![]), Err(FwCfgError::NameTooLong(long)));
    }

    #[test]
    fn dma() {
        let mut f = FwCfg::new();
        let mut ram = Ram(vec![0xcc; 0x4000]);
        assert_eq!(f.port_read(NOW, DMA_HIGH, AccessWidth::Dword).to_le_bytes(), *b"QEMU");
        assert_eq!(f.port_read(NOW, DMA_LOW, AccessWidth::Dword).to_le_bytes(), *b" CFG");
        let data: Vec<u8> = (0..6000u32).map(|i| (i * 7) as u8).collect();
        let key = f.add_file("etc/table", data.clone()).unwrap();
        let select = u32::from(key) << 16 | dma::SELECT;
        assert_eq!(run(&mut f, &mut ram, select | dma::SKIP, 100, 0), 0);
        assert_eq!(run(&mut f, &mut ram, dma::READ, 5000, 0x1000), 0);
        assert_eq!(ram.0[0x1000..0x1000 + 5000], data[100..5100]);
        assert_eq!(ram.0[0x1000 + 5000], 0xcc);
        assert_eq!(run(&mut f, &mut ram, dma::READ, 1000, 0x1000), 0);
        assert_eq!(ram.0[0x1000..0x1000 + 900], data[5100..]);
        assert_eq!(ram.0[0x1000 + 900..0x1000 + 1000], [0; 100], "beyond the end");
        assert_eq!(run(&mut f, &mut ram, select | dma::READ, 16, 0x3ff8), dma::ERROR);
        assert_eq!(run(&mut f, &mut ram, select | dma::READ, u32::MAX, u64::MAX - 5000), dma::ERROR);
        assert_eq!(run(&mut f, &mut ram, select | dma::WRITE, 16, 0x1000), dma::ERROR);
    }

    proptest! {
        #[test]
        fn survives_anything(steps in soak::steps()) {
            let mut f = FwCfg::new();
            f.add_file("etc/a", vec![1, 2, 3]).unwrap();
            soak::ports(f, FwCfg::PORTS, &steps, |f, _| {
                if let Some(gpa) = f.take_dma_request() {
                    f.run_dma(gpa, &mut Ram(vec![0xff; 64]));
                }
            });
        }
    }
}
