//! Steps of ring-0 sequences, as machine code that is the same in 32- and 64-bit mode where it can be.
//! They use RAX, RCX and RBX; RDI is the log's end, RBP the next step.

use super::{IN_LDT, LDTS, USER, USER_CS, USER_DATA};

/// What a step does to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Four bytes are read and logged.
    Read,
    /// Four bytes are written.
    Write,
    /// Four bytes are incremented.
    Modify,
    /// RET there is called.
    Fetch,
    /// A segment register is loaded from an LDT there: read as a system structure.
    Descriptor,
    /// The same with a descriptor that gets marked as accessed.
    FreshDescriptor,
    /// Read in ring 3.
    UserRead,
    /// Written in ring 3.
    UserWrite,
    /// Called in ring 3.
    UserFetch,
}

impl Access {
    /// All of them.
    pub const ALL: [Access; 9] = [
        Access::Read,
        Access::Write,
        Access::Modify,
        Access::Fetch,
        Access::Descriptor,
        Access::FreshDescriptor,
        Access::UserRead,
        Access::UserWrite,
        Access::UserFetch,
    ];
}

/// How a step of [`Access::Modify`] ends: add dword [rbx], 1.
pub const MODIFY: [u8; 3] = [0x83, 0x03, 1];

/// What is written.
pub const WRITTEN: u32 = 0x5a5a_1234;

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// mov rbx, value
pub fn load_rbx(value: u64, long: bool) -> Vec<u8> {
    if long && value >> 32 != 0 {
        join(&[&[0x48, 0xbb], &value.to_le_bytes()])
    } else {
        join(&[&[0xbb], &(value as u32).to_le_bytes()])
    }
}

/// mov eax, crN; xor eax, bits; mov crN, eax
pub fn toggle_control(register: u8, bits: u32) -> Vec<u8> {
    let modrm = 0xc0 | register << 3;
    join(&[&[0x0f, 0x20, modrm, 0x35], &bits.to_le_bytes(), &[0x0f, 0x22, modrm]])
}

/// mov rax, value; mov crN, rax
pub fn set_control(register: u8, value: u64, long: bool) -> Vec<u8> {
    let load = if long { join(&[&[0x48, 0xb8], &value.to_le_bytes()]) } else { load_eax(value as u32) };
    join(&[&load, &[0x0f, 0x22, 0xc0 | register << 3]])
}

fn load_eax(value: u32) -> Vec<u8> {
    join(&[&[0xb8], &value.to_le_bytes()])
}

/// RDMSR, XOR, WRMSR of EFER.
pub fn toggle_efer(bits: u32) -> Vec<u8> {
    join(&[&[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x35], &bits.to_le_bytes(), &[0x0f, 0x30]])
}

/// RFLAGS.AC by POPF.
pub fn set_ac(on: bool) -> Vec<u8> {
    let last: [u8; 7] = [0x81, 0x0c, 0x24, 0, 0, 4, 0];
    let clear: [u8; 7] = [0x81, 0x24, 0x24, 0xff, 0xff, 0xfb, 0xff];
    join(&[&[0x9c], if on { &last } else { &clear }, &[0x9d]])
}

/// WRPKRU.
pub fn set_pkru(value: u32) -> Vec<u8> {
    join(&[&[0x31, 0xc9, 0x31, 0xd2], &load_eax(value), &[0x0f, 0x01, 0xef]])
}

/// A table entry is replaced: four or eight bytes at a low address.
pub fn store(at: u64, value: u64, bytes: u64) -> Vec<u8> {
    let half = |at: u64, value: u32| join(&[&load_rbx(at, false), &[0xc7, 0x03], &value.to_le_bytes()]);
    let low = half(at, value as u32);
    if bytes == 4 { low } else { join(&[&low, &half(at + 4, (value >> 32) as u32)]) }
}

/// INVLPG of these pages.
pub fn invalidate(pages: impl Iterator<Item = u64>, long: bool) -> Vec<u8> {
    pages.flat_map(|page| join(&[&load_rbx(page, long), &[0x0f, 0x01, 0x3b]])).collect()
}

/// An access to `gva`; for descriptors, in the LDT of arena page `page`.
pub fn access(kind: Access, gva: u64, page: u64, long: bool) -> Vec<u8> {
    let rbx = load_rbx(gva, long);
    let wide: &[u8] = if long { &[0x48] } else { &[] };
    match kind {
        Access::Read => join(&[&rbx, &[0x8b, 0x0b], wide, &[0x89, 0x0f, 0x83, 0xc7, 8]]),
        Access::Write => join(&[&rbx, &[0xc7, 0x03], &WRITTEN.to_le_bytes()]),
        Access::Modify => join(&[&rbx, &MODIFY]),
        Access::Fetch => join(&[&rbx, &[0xff, 0xd3]]),
        Access::Descriptor => join(&[&load_ldt(page), &load_fs(IN_LDT)]),
        Access::FreshDescriptor => join(&[&load_ldt(page), &load_fs(IN_LDT + 8)]),
        Access::UserRead => join(&[&rbx, &enter_user(0, long)]),
        Access::UserWrite => join(&[&rbx, &enter_user(1, long)]),
        Access::UserFetch => join(&[&rbx, &enter_user(2, long)]),
    }
}

/// mov eax, selector; lldt ax
fn load_ldt(page: u64) -> Vec<u8> {
    join(&[&load_eax(u32::from(LDTS) + 16 * page as u32), &[0x0f, 0x00, 0xd0]])
}

/// mov eax, selector; mov fs, eax
pub fn load_fs(selector: u16) -> Vec<u8> {
    join(&[&load_eax(selector.into()), &[0x8e, 0xe0]])
}

/// IRET to the ring-3 snippet of that number. RFLAGS stays.
fn enter_user(snippet: u64, long: bool) -> Vec<u8> {
    let target = (USER + 16 * snippet) as u32;
    let iret: &[u8] = if long { &[0x48, 0xcf] } else { &[0xcf] };
    join(&[
        &[0x9c, 0x58],
        &[0x6a, USER_DATA as u8],
        &[0x68],
        &(USER as u32 + 0x1000).to_le_bytes(),
        &[0x50],
        &[0x6a, USER_CS as u8],
        &[0x68],
        &target.to_le_bytes(),
        iret,
    ])
}
