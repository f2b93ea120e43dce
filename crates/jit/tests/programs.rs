//! Random programs on the translator and on the interpreter: registers, flags, memory, counts and time are the
//! same, whatever is translated when and wherever slices end.

#[path = "programs/events.rs"]
mod events;
#[path = "programs/gates.rs"]
mod gates;
#[path = "programs/groups.rs"]
mod groups;
#[path = "programs/narrow.rs"]
mod narrow;
#[path = "programs/places.rs"]
mod places;
#[path = "programs/returns.rs"]
mod returns;
#[path = "programs/strings.rs"]
mod strings;
#[path = "programs/strings_of_bits.rs"]
mod strings_of_bits;
#[path = "programs/traces.rs"]
mod traces;
#[path = "programs/windows.rs"]
mod windows;
#[path = "programs/x87.rs"]
mod x87;

use proptest::prelude::*;
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::state::Activity;
use umbra_arch::{AccessWidth, Bus, CpuState, Exit, Fault, Gpa, Reply, Slice, Vcpu, VirtualTime, descriptor};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_jit::{Jit, JitOptions, JitStats, Mechanism, Mechanisms};
use umbra_memory::GuestMemory;

const RAM: u64 = 4 << 20;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x1800;
const TABLES: u64 = 0x2000;
/// A handler of every exception but two: HLT.
const HANDLER: u64 = 0x8000;
/// That of #NM: CLTS, IRETQ.
const HANDLER_NM: u64 = 0x8010;
/// That of #MF: FNCLEX, IRETQ.
const HANDLER_MF: u64 = 0x8020;
const CODE: u64 = 0x1_0f80;
const DATA: u64 = 0x4_0000;
const STACK: u64 = 0x8_0800;
const TICKS: u64 = 20_000;

/// Nothing is attached but what makes interrupts and NMIs wait.
#[derive(Default)]
struct Devices {
    interrupt: Option<u8>,
    nmi: bool,
    /// The interrupt that any OUT makes wait.
    by_out: Option<u8>,
}

impl Bus for Devices {
    fn mmio_read(&mut self, _: VirtualTime, _: Gpa, width: AccessWidth) -> Reply<u64> {
        Reply { value: width.mask(), cost: 3, attention: false }
    }
    fn mmio_write(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth, _: u64) -> Reply<()> {
        Reply { value: (), cost: 5, attention: false }
    }
    fn port_read(&mut self, _: VirtualTime, _: u16, _: AccessWidth) -> Reply<u32> {
        Reply { value: 0, cost: 7, attention: false }
    }
    fn port_write(&mut self, _: VirtualTime, _: u16, _: AccessWidth, _: u32) -> Reply<()> {
        self.interrupt = self.by_out.or(self.interrupt);
        Reply { value: (), cost: 9, attention: self.by_out.is_some() }
    }
    fn apic_msr_read(&mut self, _: VirtualTime, _: u32) -> Result<Reply<u64>, Fault> {
        Err(Fault::GP0)
    }
    fn apic_msr_write(&mut self, _: VirtualTime, _: u32, _: u64) -> Result<Reply<()>, Fault> {
        Err(Fault::GP0)
    }
    fn read_cr8(&mut self) -> u8 {
        0
    }
    fn write_cr8(&mut self, _: VirtualTime, _: u8) -> Reply<()> {
        Reply { value: (), cost: 0, attention: false }
    }
    fn interrupt_pending(&mut self) -> bool {
        self.interrupt.is_some()
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        self.interrupt.take()
    }
    fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }
}

/// Everything but the opcode of one instruction, from the bits of a number.
struct Choice(u64);

impl Choice {
    fn take(&mut self, n: u64) -> u64 {
        let value = self.0 % n;
        self.0 = (self.0 / n).rotate_left(29) ^ self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7;
        value
    }

    /// Any register but RSP and RDI, which point somewhere.
    fn register(&mut self) -> u8 {
        [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15][self.take(14) as usize]
    }

    /// Prefixes, opcode, ModRM and what belongs to it, without immediate; a register is the second operand.
    fn form(&mut self, prefix: &[u8], wide: bool, opcode: &[u8], reg: u8, memory: bool) -> Vec<u8> {
        let mut bytes = prefix.to_vec();
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2;
        let reg = (reg & 7) << 3;
        if !memory {
            let rm = self.register();
            bytes.push(rex | rm >> 3);
            bytes.extend(opcode);
            bytes.push(0xc0 | reg | rm & 7);
            return bytes;
        }
        match self.take(4) {
            // [rdi + disp32], now and then across a page's end or where nothing is mapped
            0 => {
                bytes.push(rex);
                bytes.extend(opcode);
                bytes.push(0x80 | reg | 7);
                let disp = [0xffcu32, 0x1004, 0x7fd, 0x20][self.take(4) as usize];
                bytes.extend(disp.to_le_bytes());
            }
            // [rdi + r14*2 + disp8]
            1 => {
                bytes.push(rex | 2);
                bytes.extend(opcode);
                bytes.extend([0x40 | reg | 4, 0x77, 0x18]);
            }
            // [r13 + 0x40]
            2 => {
                bytes.push(rex | 1);
                bytes.extend(opcode);
                bytes.extend([0x40 | reg | 5, 0x40]);
            }
            // [rdi + disp8]
            _ => {
                bytes.push(rex);
                bytes.extend(opcode);
                bytes.extend([0x40 | reg | 7, self.take(100) as u8]);
            }
        }
        bytes
    }

    fn immediate(&mut self, bytes: usize) -> Vec<u8> {
        let value = [0, 1, 0x7f, 0x80, 0xffff_ffff, 0x8000_0000, 0x1234_5678][self.take(7) as usize];
        u64::to_le_bytes(value)[..bytes].to_vec()
    }
}

/// One instruction; jumps only go forward over one byte.
fn instruction(number: u64) -> Vec<u8> {
    let mut c = Choice(number);
    let wide = c.take(2) == 1;
    let half = !wide && c.take(4) == 0;
    let prefix: &[u8] = if half { &[0x66] } else { &[] };
    let memory = c.take(3) == 0;
    let reg = c.register();
    let group = [0u8, 1, 2, 3, 4, 5, 6, 7][c.take(8) as usize];
    match c.take(56) {
        0..=3 => c.form(prefix, wide, &[0x01 + 8 * group], reg, memory),
        4..=5 => c.form(prefix, wide, &[0x03 + 8 * group], reg, memory),
        6 => c.form(&[], false, &[8 * group], reg, memory),
        7..=8 => {
            let mut bytes = c.form(prefix, wide, &[0x81], group, memory);
            bytes.extend(c.immediate(if half { 2 } else { 4 }));
            bytes
        }
        9 => {
            // The accumulator's own forms.
            let mut bytes = prefix.to_vec();
            bytes.extend([0x40 | u8::from(wide) << 3, 0x05 + 8 * group]);
            bytes.extend(c.immediate(if half { 2 } else { 4 }));
            bytes
        }
        10 => c.form(prefix, wide, &[0x85], reg, memory),
        11 => c.form(prefix, wide, &[[0x89u8, 0x8b][(group & 1) as usize]], reg, memory),
        12 => c.form(&[], false, &[[0x88u8, 0x8a][(group & 1) as usize]], reg, memory),
        13 => c.form(prefix, wide, &[0x0f, [0xb6, 0xbe, 0xb7, 0xbf][(group & 3) as usize]], reg, memory),
        14 => c.form(&[], wide, &[0x63], reg, memory),
        15..=17 => {
            // Shifts and rotates by a constant, by one, by CL.
            let opcode = [0xc1, 0xd1, 0xd3, 0xc0][c.take(4) as usize];
            let mut bytes = c.form(prefix, wide && opcode != 0xc0, &[opcode], group, memory);
            if opcode & 0xf0 == 0xc0 {
                bytes.push(c.take(70) as u8);
            }
            bytes
        }
        18 => c.form(prefix, wide, &[0xff], group & 1, memory),
        19 => c.form(&[], false, &[0xfe], group & 1, memory),
        20 => c.form(prefix, wide, &[0xf7], [2, 3, 4, 5, 4, 5, 6, 7][group as usize], memory),
        21 => c.form(prefix, wide, &[0x0f, 0xaf], reg, memory),
        22 => {
            let mut bytes = c.form(prefix, wide, &[0x69], reg, memory);
            bytes.extend(c.immediate(if half { 2 } else { 4 }));
            bytes
        }
        23 => c.form(&[], false, &[0x0f, 0x90 + (number >> 40 & 15) as u8], 0, memory),
        24 => c.form(prefix, wide, &[0x0f, 0x40 + (number >> 40 & 15) as u8], reg, memory),
        25 => {
            let mut bytes = c.form(prefix, wide, &[0x0f, 0xba], 4 + (group & 3), memory);
            bytes.push(c.take(64) as u8);
            bytes
        }
        26 => c.form(prefix, wide, &[0x0f, 0xa3 + 8 * (group & 3)], reg, false),
        27 => c.form(prefix, wide, &[0x87], reg, memory),
        28 => vec![[0x50u8, 0x51, 0x53, 0x55][(group & 3) as usize], [0x58, 0x5a, 0x5e, 0x5d][(group >> 1) as usize]],
        29 => vec![0x41, 0x50 + group, 0x41, 0x58 + (number >> 50 & 7) as u8],
        30 => [&[0x98][..], &[0x48, 0x98], &[0x99], &[0x48, 0x99], &[0xf8], &[0xf9], &[0xf5], &[0x9f]][group as usize]
            .to_vec(),
        // Jcc over an INC.
        31 => vec![0x70 + (number >> 40 & 15) as u8, 3, 0x48, 0xff, 0xc2],
        32 => c.form(&[], wide, &[0x8d], reg, true),
        33..=36 => vector(&mut c),
        37 => wide_vector(&mut c),
        38 => c.form(prefix, wide, &[0x0f, [0xc1, 0xb1, 0xb1, 0xc0][(group & 3) as usize]], reg, memory),
        44 | 45 => bits(&mut c, memory),
        46 | 47 => high_byte(&mut c),
        48 => {
            // SHLD and SHRD.
            let opcode = [0xa4, 0xa5, 0xac, 0xad][c.take(4) as usize];
            let mut bytes = c.form(prefix, wide, &[0x0f, opcode], reg, memory);
            if opcode & 1 == 0 {
                bytes.push(c.take(70) as u8);
            }
            bytes
        }
        49 => {
            // PUSH of memory, then POP.
            let mut bytes = c.form(&[], false, &[0xff], 6, true);
            bytes.push([0x58, 0x5a, 0x5e, 0x5d][c.take(4) as usize]);
            bytes
        }
        39..=43 => x87::instruction(&mut c),
        50 => system(&mut c),
        51 => repeated(&mut c),
        // CALL of a function behind the next jump.
        _ => {
            let mut bytes = vec![0xe8, 5, 0, 0, 0];
            // jmp +7; three NOPs; lea edx, [rdx + 1]; ret.
            bytes.extend([0xeb, 7, 0x90, 0x90, 0x90, 0x8d, 0x52, 0x01, 0xc3]);
            bytes
        }
    }
}

/// Flags and the time as seen by instructions, NOPs with operands.
fn system(c: &mut Choice) -> Vec<u8> {
    const SYSTEM: [&[u8]; 6] = [
        &[0x9c, 0x58],                                     // pushfq; pop rax
        &[0x0f, 0x31],                                     // rdtsc
        &[0x0f, 0x01, 0xf9],                               // rdtscp
        &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0, 0, 0, 0], // nop word cs:[rax + rax]
        &[0x0f, 0x1f, 0x40, 0x00],                         // nop dword [rax]
        &[0x3e, 0x0f, 0x18, 0x08],                         // prefetcht0 ds:[rax]
    ];
    SYSTEM[c.take(6) as usize].to_vec()
}

/// A string instruction with REP between others, now and then across a page's end.
fn repeated(c: &mut Choice) -> Vec<u8> {
    // push rdi; push rcx; push rsi; lea rsi, [rdi + 0x100]; lea rdi, [rdi + 0xfe0]; mov ecx, count
    let mut bytes = vec![0x57, 0x51, 0x56, 0x48, 0x8d, 0xb7, 0, 1, 0, 0, 0x48, 0x8d, 0xbf, 0xe0, 0x0f, 0, 0, 0xb9];
    bytes.extend((c.take(80) as u32).to_le_bytes());
    let which: [&[u8]; 6] =
        [&[0xf3, 0xa4], &[0xf3, 0x48, 0xa5], &[0xf3, 0xaa], &[0xf3, 0x48, 0xab], &[0xf3, 0xa6], &[0xf2, 0xae]];
    bytes.extend(which[c.take(6) as usize]);
    // pop rsi; pop rcx; pop rdi
    bytes.extend([0x5e, 0x59, 0x5f]);
    bytes
}

/// Byte operations without REX, so that four of eight registers are the second bytes of others.
fn high_byte(c: &mut Choice) -> Vec<u8> {
    let group = c.take(8) as u8;
    let opcode: &[u8] = match c.take(9) {
        0 => &[8 * group],
        1 => &[8 * group + 2],
        2 => &[[0x88, 0x8a, 0x86, 0x84][usize::from(group & 3)]],
        3 => &[0x80],
        4 => &[0xf6],
        5 => &[0xfe],
        6 => &[0x0f, 0x90 | c.take(16) as u8],
        7 => &[0x0f, [0xb6, 0xbe, 0xc0, 0xb0][usize::from(group & 3)]],
        _ => &[[0xc0, 0xd0, 0xd2][usize::from(group % 3)]],
    };
    let extension = match opcode {
        [0xf6] => [0, 2, 3, 0][usize::from(group & 3)],
        [0xfe] => group & 1,
        _ => group,
    };
    let mut bytes = opcode.to_vec();
    let memory = c.take(4) == 0;
    bytes.push(extension << 3 | if memory { 7 } else { 0xc0 | [0, 1, 2, 3, 4, 5, 6, 7][c.take(8) as usize] });
    if matches!(opcode, [0x80] | [0xc0]) || opcode == [0xf6] && extension == 0 {
        bytes.push(c.take(256) as u8);
    }
    bytes
}

/// A bit scan, count or field; MOVBE.
fn bits(c: &mut Choice, memory: bool) -> Vec<u8> {
    let (reg, wide) = (c.register(), c.take(2) == 1);
    let prefix: &[u8] = [&[][..], &[0xf3], &[0x66], &[0x66, 0xf3]][c.take(4) as usize];
    match c.take(8) {
        0 => c.form(prefix, wide, &[0x0f, 0xbc], reg, memory),
        1 => c.form(prefix, wide, &[0x0f, 0xbd], reg, memory),
        2 => c.form(&[0xf3], wide, &[0x0f, 0xb8], reg, memory),
        3 => {
            let (prefix, opcode): (&[u8], _) = ([&[][..], &[0x66]][c.take(2) as usize], 0xf0 | c.take(2) as u8);
            c.form(prefix, wide, &[0x0f, 0x38, opcode], reg, true)
        }
        _ => bit_field(c, reg, wide),
    }
}

/// VEX-encoded, on registers or `[rdi + 0x10]`.
fn bit_field(c: &mut Choice, reg: u8, wide: bool) -> Vec<u8> {
    // pp bits and opcode: ANDN, the group of BLSR, BZHI, PEXT, PDEP, BEXTR, SHLX, SARX, SHRX.
    const FORMS: [(u8, u8); 9] =
        [(0, 0xf2), (0, 0xf3), (0, 0xf5), (2, 0xf5), (3, 0xf5), (0, 0xf7), (1, 0xf7), (2, 0xf7), (3, 0xf7)];
    let (prefix, opcode) = FORMS[c.take(9) as usize];
    let reg = if opcode == 0xf3 { 1 + reg % 3 } else { reg };
    let (second, rm) = (c.register(), c.register());
    let memory = c.take(3) == 0;
    let rm = if memory { 7 } else { rm };
    let first = u8::from(reg < 8) << 7 | 0x40 | u8::from(rm < 8) << 5 | 2;
    let mut bytes = vec![0xc4, first, u8::from(wide) << 7 | (!second & 15) << 3 | prefix, opcode];
    bytes.extend(if memory { vec![0x47 | reg << 3 & 0x38, 0x10] } else { vec![0xc0 | reg << 3 & 0x38 | rm & 7] });
    bytes
}

/// An SSE instruction.
fn vector(c: &mut Choice) -> Vec<u8> {
    const PREFIXES: [&[u8]; 4] = [&[], &[0x66], &[0xf3], &[0xf2]];
    let opcode = 0x50 + c.take(16) as u8;
    let (prefix, opcode) = match c.take(9) {
        // Arithmetic of all four types; logic, conversions.
        0 | 1 => (PREFIXES[c.take(4) as usize], [0x51u8, 0x58, 0x59, 0x5c, 0x5d, 0x5e, 0x5f][c.take(7) as usize]),
        2 => (PREFIXES[c.take(2) as usize], [0x14, 0x15, 0x54, 0x55, 0x56, 0x57, 0x2e, 0x2f, 0x5a][c.take(9) as usize]),
        3 => (PREFIXES[c.take(4) as usize], [0x10, 0x11][c.take(2) as usize]),
        4 => (PREFIXES[c.take(2) as usize], [0x28, 0x29][c.take(2) as usize]),
        5 => (PREFIXES[1 + c.take(2) as usize], [0x6f, 0x7f][c.take(2) as usize]),
        6 => (PREFIXES[2 + c.take(2) as usize], [0x2a, 0x2c, 0x2d][c.take(3) as usize]),
        7 => return special_vector(c),
        _ => (PREFIXES[1], [0x60, 0x62, 0x6c, 0x74, 0xd4, 0xdb, 0xef, 0xfe, 0xf4, 0x6e, 0x7e][opcode as usize % 11]),
    };
    let (reg, wide, memory) = (c.register(), c.take(2) == 1, c.take(3) == 0);
    c.form(prefix, wide, &[0x0f, opcode], reg, memory)
}

/// With operands that aren't named, or on control state.
fn special_vector(c: &mut Choice) -> Vec<u8> {
    const CHOICES: [&[u8]; 16] = [
        &[0x66, 0x0f, 0x38, 0x10, 0xca],                 // pblendvb xmm1, xmm2, xmm0
        &[0x66, 0x44, 0x0f, 0x38, 0x14, 0x47, 0x30],     // blendvps xmm8, [rdi + 0x30], xmm0
        &[0x66, 0x0f, 0x3a, 0x63, 0xca, 0x0c],           // pcmpistri xmm1, xmm2, 12
        &[0x66, 0x0f, 0x3a, 0x62, 0x4f, 0x11, 0x48],     // pcmpistrm xmm1, [rdi + 0x11], 0x48
        &[0x66, 0x0f, 0x3a, 0x61, 0xca, 0x0c],           // pcmpestri xmm1, xmm2, 12
        &[0x66, 0x44, 0x0f, 0xf7, 0xca],                 // maskmovdqu xmm9, xmm2
        &[0x66, 0x45, 0x0f, 0x38, 0x17, 0xca],           // ptest xmm9, xmm10
        &[0x44, 0x0f, 0x50, 0xd9],                       // movmskps r11d, xmm1
        &[0xf3, 0x4c, 0x0f, 0x2d, 0x1f],                 // cvtss2si r11, [rdi]
        &[0x0f, 0xae, 0x5f, 0x44],                       // stmxcsr [rdi + 0x44]
        &[0x0f, 0xae, 0x97, 0x20, 0x18, 0, 0],           // ldmxcsr [rdi + 0x1820]
        &[0x0f, 0xae, 0x97, 0x24, 0x18, 0, 0],           // ldmxcsr [rdi + 0x1824]: unmasks
        &[0xc4, 0xe2, 0x75, 0x2c, 0x57, 0x50],           // vmaskmovps ymm2, ymm1, [rdi + 0x50]
        &[0xc4, 0xe2, 0x75, 0x8e, 0x97, 0xf0, 15, 0, 0], // vpmaskmovd [rdi + 0xff0], ymm1, ymm2
        &[0xc5, 0xf8, 0x77],                             // vzeroupper
        &[0xc5, 0xfc, 0x77],                             // vzeroall
    ];
    CHOICES[c.take(16) as usize].to_vec()
}

/// An AVX instruction on registers or `[rdi]`, of 16 or 32 bytes; FMA now and then.
fn wide_vector(c: &mut Choice) -> Vec<u8> {
    let (length, source) = ((c.take(2) as u8) << 2, !(c.register() & 7) & 15);
    let modrm = c.register() << 3 & 0x38 | [0xc0 | c.register() & 7, 7][c.take(2) as usize];
    match c.take(4) {
        0 => vec![0xc5, 0xf8 | length | 2, [0x6f, 0x7f][c.take(2) as usize], modrm],
        1 => vec![0xc4, 0xe2, source << 3 | length | 1, [0x98, 0xa8, 0xb8][c.take(3) as usize], modrm],
        _ => {
            let opcode = [0x58, 0x59, 0x5c, 0x57, 0xef, 0xfe, 0x74][c.take(7) as usize];
            vec![0xc5, 0x80 | source << 3 | length | 1, opcode, modrm]
        }
    }
}

/// Sets registers up, runs the body a number of times, halts.
fn program(body: &[u64]) -> Vec<u8> {
    looped(body.iter().flat_map(|&number| instruction(number)))
}

fn looped(body: impl Iterator<Item = u8>) -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc7]; // mov rdi, DATA
    code.extend((DATA as u32).to_le_bytes());
    code.extend([0x49, 0xc7, 0xc5]); // mov r13, DATA + 0x800
    code.extend((DATA as u32 + 0x800).to_le_bytes());
    code.extend([0x45, 0x31, 0xf6]); // xor r14d, r14d
    code.extend(body);
    count_down(&mut code, &[0xff, 0x0c, 0x25], DATA + 0x1800);
    code.push(0xf4);
    code
}

/// Back to the start as often as the counter in memory says, which `dec` and its address decrement.
fn count_down(code: &mut Vec<u8>, dec: &[u8], counter: u64) {
    code.extend(dec);
    code.extend((counter as u32).to_le_bytes());
    let back = -(code.len() as i32 + 6);
    code.extend([0x0f, 0x85]); // jnz
    code.extend(back.to_le_bytes());
}

fn memory(code: &[u8], data: u64) -> Arc<GuestMemory> {
    let mem = Arc::new(GuestMemory::new(RAM).unwrap());
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(GDT + 8, descriptor::encode(0, u32::MAX, Attr(0xa09b)));
    put(GDT + 16, descriptor::encode(0, u32::MAX, Attr(0xc093)));
    for vector in 0..32 {
        let handler = match vector {
            7 => HANDLER_NM,
            16 => HANDLER_MF,
            _ => HANDLER,
        };
        put(IDT + 16 * vector, handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48);
    }
    put(TABLES, TABLES + 0x1003);
    put(TABLES + 0x1000, TABLES + 0x2003);
    put(TABLES + 0x2000, 0x83);
    mem.write(Gpa::new(HANDLER), &[0xf4]);
    mem.write(Gpa::new(HANDLER_NM), &[0x0f, 0x06, 0x48, 0xcf]);
    mem.write(Gpa::new(HANDLER_MF), &[0xdb, 0xe2, 0x48, 0xcf]);
    mem.write(Gpa::new(CODE), code);
    for at in (0..0x2000).step_by(8) {
        put(DATA + at, data.wrapping_mul(at | 1).rotate_left(at as u32 & 63));
    }
    put(DATA + 0x1800, 40);
    put(DATA + 0x1820, 0x3f80 | 0x1e80 << 32);
    for (n, word) in x87::WORDS.iter().enumerate() {
        mem.write(Gpa::new(x87::CONTROL + 2 * n as u64), &word.to_le_bytes());
    }
    mem
}

/// Linear pages of their own.
const WINDOW: u64 = 0x4000_0000;

/// As [`memory`] with such page-table entries at [`WINDOW`], and so many rounds of a loop.
fn windowed(code: &[u8], data: u64, pages: &[u64], rounds: u64) -> Arc<GuestMemory> {
    let mem = memory(code, data);
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(TABLES + 0x1000 + 8, TABLES + 0x3003);
    put(TABLES + 0x3000, TABLES + 0x4003);
    for (n, page) in pages.iter().enumerate() {
        put(TABLES + 0x4000 + 8 * n as u64, *page);
    }
    put(DATA + 0x1800, rounds);
    mem
}

fn start(data: u64) -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(0x8000_0033);
    s.cr3 = Cr3::new(TABLES);
    s.cr4 = Cr4::new(0x20 | 0x600 | 0x4_0000);
    s.xcr0 = 7;
    // Now and then an exception of floating point is unmasked.
    s.fp.mxcsr = if data & 7 == 1 { 0x1f80 & !(1 << (7 + (data >> 3) % 6)) } else { 0x1f80 };
    for (n, x) in s.fp.xmm.iter_mut().enumerate() {
        *x = [data.rotate_left(n as u32 * 7), (n as f64 * 1.25).to_bits()];
    }
    for (n, y) in s.fp.ymm_high.iter_mut().enumerate() {
        *y = [data.rotate_right(n as u32 * 3), data ^ n as u64];
    }
    s.fp.fcw = x87::WORDS[if data & 0x70 == 0 { data as usize >> 8 & 7 } else { 0 }];
    (s.fp.ftw, s.fp.fsw) = (data as u8, (data >> 8) as u16 & 0x3800);
    for (n, st) in s.fp.st.iter_mut().enumerate() {
        let exponent = [0x3fff, 0x4001, 0xbffe, data.rotate_right(8 * n as u32) & 0xffff][n & 3];
        *st = [data.rotate_left(n as u32 * 11) | 1 << 63, exponent];
    }
    s.efer = Efer::new(0x501);
    let flat = |selector, attr| Segment { selector, base: 0, limit: u32::MAX, attr: Attr(attr) };
    for (seg, selector, attr) in [
        (Seg::Cs, 8, 0xa09b),
        (Seg::Ds, 16, 0xc093),
        (Seg::Es, 16, 0xc093),
        (Seg::Ss, 16, 0xc093),
        (Seg::Fs, 16, 0xc093),
        (Seg::Gs, 16, 0xc093),
    ] {
        s.seg[seg as usize] = flat(selector, attr);
    }
    s.gdtr = TableRegister { base: GDT, limit: 0xff };
    s.idtr = TableRegister { base: IDT, limit: 0x1ff };
    s.rip = CODE;
    for (n, r) in s.gpr.iter_mut().enumerate() {
        *r = data.rotate_left(n as u32 * 5) >> (n * 3);
    }
    s.gpr[4] = STACK;
    s.activity = Activity::Running;
    s
}

/// What can be compared.
#[derive(PartialEq, Debug)]
struct Seen {
    state: CpuState,
    retired: u64,
    now: u64,
    memory: Vec<u8>,
}

fn run(engine: &mut dyn Vcpu, mem: &GuestMemory, start: &CpuState, stops: &[u64]) -> Seen {
    engine.set_state(start);
    let mut now = VirtualTime(0);
    'end: for &stop in stops {
        while now.0 < stop {
            let stopped = engine.run(&mut Devices::default(), Slice { now, until: VirtualTime(stop) });
            now = stopped.now;
            match stopped.exit {
                Exit::BudgetSpent | Exit::Attention => {}
                _ => break 'end,
            }
        }
    }
    let read = |(at, bytes)| {
        let mut part = vec![0; bytes];
        mem.read(Gpa::new(at), &mut part);
        part
    };
    let memory =
        [(DATA, 0x4_2000), (0, 0x400), (narrow::HIGH, 0x400), (narrow::HIGH_END - 0x400, 0x400)].map(read).concat();
    Seen { state: engine.state(), retired: engine.retired(), now: now.0, memory }
}

fn compare(code: &[u8], data: u64, options: JitOptions, stops: &[u64]) -> Result<JitStats, TestCaseError> {
    compare_on(|| memory(code, data), code, data, options, stops)
}

/// Where slices of these lengths end, and the last one.
fn slices(lengths: &[u64], end: u64) -> Vec<u64> {
    let mut at = 0;
    let ends = lengths.iter().map(|length| {
        at += length;
        at
    });
    ends.chain([end]).collect()
}

/// As [`compare`] on other memory.
fn compare_on(
    memory: impl Fn() -> Arc<GuestMemory>,
    code: &[u8],
    data: u64,
    options: JitOptions,
    stops: &[u64],
) -> Result<JitStats, TestCaseError> {
    compare_from(memory, &start(data), code, options, stops)
}

/// As [`compare_on`] from another state.
fn compare_from(
    memory: impl Fn() -> Arc<GuestMemory>,
    start: &CpuState,
    code: &[u8],
    options: JitOptions,
    stops: &[u64],
) -> Result<JitStats, TestCaseError> {
    let profile = CpuidProfile::default();
    let mem = memory();
    let mut interp = Interpreter::new(Arc::clone(&mem), &profile, 0, &EngineOptions::default()).unwrap();
    let expected = run(&mut interp, &mem, start, &stops[stops.len() - 1..]);
    let mem = memory();
    let mut jit = Jit::new(Arc::clone(&mem), &profile, 0, &EngineOptions::default(), options).unwrap();
    let seen = run(&mut jit, &mem, start, stops);
    let difference = seen.memory.iter().zip(&expected.memory).position(|(a, b)| a != b);
    prop_assert_eq!(difference, None, "memory, {:02x?}", code);
    let Seen { state, retired, now, .. } = seen;
    prop_assert_eq!(state, expected.state, "{:02x?}", code);
    prop_assert_eq!((retired, now), (expected.retired, expected.now), "{:02x?}", code);
    Ok(jit.stats())
}

const SMALL: JitOptions =
    JitOptions { threshold: 2, hot_after: 0, code_bytes: 1 << 20, legacy: true, ..JitOptions::DEFAULT };

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn programs_do_the_same_on_both_engines(body in prop::collection::vec(any::<u64>(), 1..40), data: u64) {
        compare(&program(&body), data, SMALL, &[TICKS])?;
    }

    #[test]
    fn x87_programs_do_the_same_on_both_engines(
        body in prop::collection::vec(any::<u64>(), 1..40),
        data: u64,
        pieces in prop::collection::vec(1..1000u64, 0..10),
    ) {
        let stops = slices(&pieces, TICKS);
        compare(&x87::program(&body), data, SMALL, &stops)?;
    }

    #[test]
    fn slices_may_end_anywhere(
        body in prop::collection::vec(any::<u64>(), 1..40),
        data: u64,
        pieces in prop::collection::vec(1..300u64, 1..20),
    ) {
        let stops = slices(&pieces, TICKS);
        compare(&program(&body), data, SMALL, &stops)?;
    }
}

/// The programs above are of any use: most of what they run is translated.
#[test]
fn most_of_a_loop_is_translated() {
    let stats = compare(&program(&[0x1234, 0x77, 0x9999]), 5, SMALL, &[TICKS]).unwrap();
    assert!(stats.ops_translated > 5 * stats.ops_interpreted, "{stats}");
    assert!(stats.linked > 0 && stats.left_by_link > 0, "{stats}");
}

#[test]
fn full_code_memory_is_emptied_and_filled_again() {
    // 1500 blocks in a ring of stores: ADD [RDI], RAX; the last jumps back while a counter lasts.
    let mut code = vec![0x48, 0xc7, 0xc7];
    code.extend((DATA as u32).to_le_bytes());
    let ring = code.len();
    for _ in 0..1500 {
        code.extend([0x48, 0x01, 0x07].repeat(12));
        code.extend([0xeb, 0]);
    }
    code.extend([0xff, 0x0c, 0x25]);
    code.extend((DATA as u32 + 0x1800).to_le_bytes());
    code.extend([0x0f, 0x85]);
    code.extend((ring as i32 - code.len() as i32 - 4).to_le_bytes());
    code.push(0xf4);
    let stats = compare(&code, 3, JitOptions { code_bytes: 0, ..SMALL }, &[100_000]).unwrap();
    assert!(stats.emptied > 1 && stats.code_bytes > 0, "{stats}");
}

/// Counts up to 120, and patches a function that it calls now and then.
fn patching() -> Vec<u8> {
    // MOV EAX, imm32 gets another immediate in each round; RET goes where it was called from.
    let mut code = vec![0x48, 0xc7, 0xc7];
    code.extend((DATA as u32).to_le_bytes());
    let round = code.len();
    let function = 0x200;
    code.extend([0xe8]);
    code.extend((function - code.len() as i32 - 4).to_le_bytes());
    code.extend([0x01, 0xc3]); // add ebx, eax
    // Every eighth round: test bl, 7; jnz over; inc dword [function + 1]
    code.extend([0xff, 0xc1, 0xf6, 0xc1, 7, 0x75, 7, 0xff, 0x04, 0x25]);
    code.extend((CODE as u32 + function as u32 + 1).to_le_bytes());
    code.extend([0x83, 0xf9, 120, 0x0f, 0x8c]); // cmp ecx, 120; jl
    code.extend((round as i32 - code.len() as i32 - 4).to_le_bytes());
    code.push(0xf4);
    code.resize(function as usize, 0x90);
    code.extend([0xb8, 1, 0, 0, 0, 0xc3]);
    code
}

#[test]
fn code_that_patches_itself_is_translated_again() {
    let stats = compare(&patching(), 0, SMALL, &[TICKS]).unwrap();
    assert!(stats.left_by_op > 5 && stats.ops_by_helper > 5, "{stats}");
    assert!(stats.dropped > 5 && stats.translated > 5 && stats.left_by_miss > 0, "{stats}");
}

#[test]
fn no_more_blocks_are_translated_than_the_limit_says() {
    let stats = compare(&patching(), 0, JitOptions { limit: 2, ..SMALL }, &[TICKS]).unwrap();
    assert_eq!(stats.translated, 2);
}

/// What is at home in the host's x87 and vector registers needs functions only where a page is missing.
#[test]
fn code_on_host_registers_calls_no_functions() {
    const BODIES: [&[u8]; 7] = [
        // fld qword [rdi]; fmul st0, st0; fld1; faddp; fstp tbyte [rdi + 0x40]; fwait
        &[0xdd, 0x07, 0xdc, 0xc8, 0xd9, 0xe8, 0xde, 0xc1, 0xdb, 0x7f, 0x40, 0x9b],
        // fnstcw [rdi + 0x30]; fldcw [rdi + 0x1810]; fnstsw ax
        &[0xd9, 0x7f, 0x30, 0xd9, 0xaf, 0x10, 0x18, 0, 0, 0xdf, 0xe0],
        // movq mm1, [rdi]; paddd mm1, mm1; movq [rdi], mm1; emms
        &[0x0f, 0x6f, 0x0f, 0x0f, 0xfe, 0xc9, 0x0f, 0x7f, 0x0f, 0x0f, 0x77],
        // stmxcsr [rdi + 0x44]; ldmxcsr [rdi + 0x1820]; cvtsd2si eax, [rdi]; vzeroupper
        &[0x0f, 0xae, 0x5f, 0x44, 0x0f, 0xae, 0x97, 0x20, 0x18, 0, 0, 0xf2, 0x0f, 0x2d, 0x07, 0xc5, 0xf8, 0x77],
        // tzcnt r11, rax; bsf rax, rdx; blsr rax, rax; movbe eax, [rdi]
        &[0xf3, 0x4c, 0x0f, 0xbc, 0xd8, 0x48, 0x0f, 0xbc, 0xc2, 0xc4, 0xe2, 0xf8, 0xf3, 0xc8, 0x0f, 0x38, 0xf0, 0x07],
        // add eax, edx; pause; adc esi, 3; pause
        &[0x01, 0xd0, 0xf3, 0x90, 0x83, 0xd6, 3, 0xf3, 0x90],
        // and ah, 0x45; push [rdi]; pop rax; shrd rax, rdx, cl; rol eax, 5
        &[0x80, 0xe4, 0x45, 0xff, 0x37, 0x58, 0x48, 0x0f, 0xad, 0xd0, 0xc1, 0xc0, 5],
    ];
    for body in BODIES {
        let stats = compare(&looped(body.iter().copied()), 0, SMALL, &[TICKS]).unwrap();
        assert!(stats.ops_translated > 150 && stats.ops_by_helper < 10, "{body:02x?} {stats}");
    }
}

/// PAUSE with REX.B is XCHG of RAX and R8.
#[test]
fn not_every_pause_is_one() {
    for rex in [0x41, 0x49] {
        compare(&looped([0xff, 0xc0, 0xf3, rex, 0x90].into_iter()), 0x55, SMALL, &[TICKS]).unwrap();
    }
}

/// A function that adds, multiplies and stores, called in a loop.
fn calling() -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc7];
    code.extend((DATA as u32).to_le_bytes());
    let round = code.len();
    // call the function; clac; paddd xmm0, xmm1; fld1; rep stosb, with RCX at 0; dec dword [0x41800]
    code.extend([
        0xe8, 28, 0, 0, 0, 0x0f, 0x01, 0xca, 0x66, 0x0f, 0xfe, 0xc1, 0xd9, 0xe8, 0x31, 0xc9, 0xf3, 0xaa, 0xff, 0x0c,
        0x25,
    ]);
    code.extend((DATA as u32 + 0x1800).to_le_bytes());
    code.extend([0x0f, 0x85]);
    code.extend((round as i32 - code.len() as i32 - 4).to_le_bytes());
    code.extend([0xf4, 0x90]);
    // add eax, ecx; add ecx, 3, ten times; xor edx, eax; add [rdi], rdx; mov esi, [rdi + 8]
    code.extend([0x01, 0xc8]);
    code.extend([0x83, 0xc1, 3].repeat(10));
    code.extend([0x31, 0xc2, 0x48, 0x01, 0x17, 0x8b, 0x77, 8]);
    // test esi, esi; js over the nop; nop; ret
    code.extend([0x85, 0xf6, 0x78, 1, 0x90, 0xc3]);
    code
}

/// Each mechanism that is left out changes what its counter says, and no result.
#[test]
fn mechanisms_can_be_left_out() {
    let without = |off| compare(&calling(), 8, JitOptions { off, ..SMALL }, &[TICKS]).unwrap();
    let all = without(Mechanisms::NONE);
    assert!(all.ops_translated > 100 && all.linked > 0 && all.ops_by_helper < all.ops_translated / 2, "{all}");
    let jumpless = without(Mechanisms::NONE.with(Mechanism::Jumps).with(Mechanism::Returns));
    for mechanism in Mechanism::ALL {
        let some = without(Mechanisms::NONE.with(mechanism));
        let differs = match mechanism {
            Mechanism::Native => some.ops_by_helper == some.ops_translated && some.translated_helpers > 0,
            Mechanism::Vectors | Mechanism::X87 | Mechanism::Strings | Mechanism::Views => {
                some.translated_helpers == all.translated_helpers + 1
            }
            Mechanism::Memory => some.translated_helpers > all.translated_helpers + 2,
            Mechanism::Ranges => some.code_bytes != all.code_bytes && some.translated_helpers == all.translated_helpers,
            Mechanism::Groups => some.code_bytes > all.code_bytes && some.translated_helpers == all.translated_helpers,
            Mechanism::Traces => some.translated > all.translated,
            Mechanism::Budgets => {
                some.code_bytes != all.code_bytes && some.translated_helpers == all.translated_helpers
            }
            // See `windows`.
            Mechanism::Windows => some == all,
            Mechanism::Flags => some.code_bytes > all.code_bytes,
            Mechanism::Links => some.linked == 0 && some.left_by_link > 10 * all.left_by_link,
            // What returns is found without.
            Mechanism::Jumps => some.left_by_miss < 10 && jumpless.left_by_miss > 30,
            Mechanism::Returns => {
                some.code_bytes != all.code_bytes && some.translated_helpers == all.translated_helpers
            }
        };
        assert!(differs, "{mechanism:?}: {some}\nall:\n{all}");
    }
}

/// An instruction in two pages has host code.
#[test]
fn an_instruction_across_pages_calls_no_function() {
    // ADD RAX, 0x12345678 in a loop: its first two bytes are a page's last.
    let mut code = vec![0x90; 0x7e - 7 - 7 - 3];
    code.extend([0x48, 0x05, 0x78, 0x56, 0x34, 0x12]);
    let stats = compare(&looped(code.into_iter()), 0, SMALL, &[TICKS]).unwrap();
    assert!(stats.ops_translated > 2000 && stats.ops_by_helper < 10, "{stats}");
}
