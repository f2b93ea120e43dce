//! Integer rows against the host CPU: random encodings, operands and flags.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use std::collections::BTreeMap;
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::rflags;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::{AccessWidth, Bus, CpuState, Fault, Gpa, Reply, VirtualTime};
use umbra_cpu::core::CodeSize;
use umbra_cpu::{Core, EngineOptions, decode, isa};
use umbra_hostexec::{Class, HostExec, MemBuf, Outcome};
use umbra_memory::GuestMemory;

/// No devices.
struct NoBus;
impl Bus for NoBus {
    fn mmio_read(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth) -> Reply<u64> {
        Reply::quiet(u64::MAX)
    }
    fn mmio_write(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth, _: u64) -> Reply<()> {
        Reply::quiet(())
    }
    fn port_read(&mut self, _: VirtualTime, _: u16, _: AccessWidth) -> Reply<u32> {
        Reply::quiet(u32::MAX)
    }
    fn port_write(&mut self, _: VirtualTime, _: u16, _: AccessWidth, _: u32) -> Reply<()> {
        Reply::quiet(())
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
        Reply::quiet(())
    }
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
}

/// splitmix64: the test repeats exactly.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Edge values as often as random ones.
    fn operand(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
        ];
        match self.below(4) {
            0 => EDGES[self.below(12) as usize],
            1 => EDGES[self.below(12) as usize].wrapping_neg(),
            2 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }
}

const WINDOW: u64 = 0x10_0000;

fn core() -> Core {
    let mem = Arc::new(GuestMemory::new(4 << 20).unwrap());
    mem.write(Gpa::new(0x1000), &0x2003u64.to_le_bytes());
    mem.write(Gpa::new(0x2000), &0x3003u64.to_le_bytes());
    for i in 0..2u64 {
        mem.write(Gpa::new(0x3000 + 8 * i), &(i << 21 | 0x83).to_le_bytes());
    }
    let profile = CpuidProfile::named("umbra-v3").unwrap();
    let mut core = Core::new(mem, &profile, 0, &EngineOptions::default()).unwrap();
    let mut state = CpuState::reset();
    state.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE);
    state.cr3 = Cr3::new(0x1000);
    state.cr4 = Cr4::new(Cr4::PAE | Cr4::OSFXSR);
    state.efer = Efer::new(Efer::LME | Efer::LMA);
    state.seg[Seg::Cs as usize] = Segment::code64(8, 0);
    for seg in [Seg::Ds, Seg::Es, Seg::Ss, Seg::Fs, Seg::Gs] {
        state.seg[seg as usize] = Segment::flat_data(16, 0);
    }
    core.set_state(&state);
    core
}

fn encoding(r: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    if r.below(4) == 0 {
        bytes.push(0x66);
    }
    if r.below(8) == 0 {
        bytes.push([0xf2, 0xf3, 0xf0][r.below(3) as usize]);
    }
    match r.below(8) {
        0 => bytes.extend([0xc4, 0xe0 & r.next() as u8 | 2, r.next() as u8 & 0xfb, 0xf0 | r.next() as u8 & 7]),
        n => {
            if n < 5 {
                bytes.push(0x40 | r.next() as u8 & 15);
            }
            match r.below(8) {
                0..3 => bytes.push(r.next() as u8),
                3..7 => bytes.extend([0x0f, r.next() as u8]),
                _ => bytes.extend([0x0f, 0x38, 0xf0 | r.next() as u8 & 7]),
            }
        }
    }
    bytes.extend(r.next().to_le_bytes());
    bytes.extend(r.next().to_le_bytes());
    bytes.truncate(15);
    bytes
}

fn describe(i: &Instruction) -> String {
    format!("{i:?} {:?}", i.code())
}

/// "If the count is greater than the operand size, the result is undefined": processors differ.
fn is_undefined(i: &Instruction, rcx: u64) -> bool {
    let double = matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    let counted = double && i.op_count() == 3;
    if !counted {
        return false;
    }
    let count = if i.op2_kind() == OpKind::Register { rcx } else { i.immediate(2) } & 31;
    i.op1_register().size() == 2 && count > 16
}

/// Runs `cases` random instructions on both; returns how many codes were seen.
fn compare(seed: u64, cases: usize) -> usize {
    let mut r = Random(seed);
    let mut core = core();
    let mut host = HostExec::new().unwrap();
    let mut seen = BTreeMap::new();
    let mut done = 0;
    while done < cases {
        let bytes = encoding(&mut r);
        let i = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
        if i.is_invalid() {
            continue;
        }
        let Some((_, row)) = isa::row_of(i.code()) else { continue };
        let Ok(prepared) = host.prepare(&i) else { continue };
        if prepared.class != Class::Integer {
            continue;
        }
        let decoded = decode::resolve(&i, CodeSize::Bits64, &core.profile, &mut core.host);
        let mut op = decoded.op;
        for k in 0..16 {
            core.gpr[k] = r.operand();
        }
        let flags = [0, rflags::STATUS, r.next() & rflags::STATUS][r.below(3) as usize];
        core.s.rflags = rflags::FIXED;
        core.set_rflags(flags | rflags::FIXED);
        // Near a page's end every fourth time.
        let at = if r.below(4) == 0 { WINDOW + 0x1000 - r.below(17) } else { WINDOW + 16 * r.below(64) };
        let at = if i.mnemonic() == Mnemonic::Cmpxchg16b { at & !15 } else { at };
        op.disp = op.disp.wrapping_add(at.wrapping_sub(core.effective(&op)));
        let mut buffer = MemBuf::default();
        for chunk in buffer.0.chunks_exact_mut(8) {
            chunk.copy_from_slice(&r.operand().to_le_bytes());
        }
        core.mem.write(Gpa::new(at), &buffer.0);
        let mut gpr: [u64; 16] = core.gpr[..16].try_into().unwrap();
        if is_undefined(&i, core.gpr[1]) {
            continue;
        }
        let mut host_flags = flags | rflags::FIXED;
        let mut fp = core.s.fp;
        let before = (gpr, flags);
        let outcome = host.run(prepared.op, &mut fp, &mut gpr, &mut host_flags, &mut buffer);
        let flow = (op.exec)(&mut core, &mut NoBus, &op);
        let what = || format!("{} after {before:x?}, operand at {at:#x}", describe(&i));
        match outcome {
            Outcome::DivideError => assert!(flow.is_err() && core.fault == Fault::DIVIDE, "{}", what()),
            _ => {
                assert!(flow.is_ok(), "{}: {}", what(), core.fault);
                assert_eq!(&core.gpr[..16], &gpr[..], "registers: {}", what());
                let defined = rflags::STATUS & !row.undefined;
                let (ours, theirs) = (core.rflags() & defined, host_flags & defined);
                assert_eq!(ours, theirs, "flags {:x}: {}", ours ^ theirs, what());
                let mut memory = [0; 64];
                core.mem.read(Gpa::new(at), &mut memory);
                let touched = usize::from(prepared.mem_write.max(prepared.mem_read));
                assert_eq!(memory[..touched], buffer.0[..touched], "memory: {}", what());
            }
        }
        *seen.entry(i.code()).or_insert(0) += 1;
        done += 1;
    }
    seen.len()
}

#[test]
fn integer_rows_agree_with_the_host() {
    let codes = compare(1, 400_000);
    assert!(codes > 300, "only {codes} codes were reached");
}
