//! A case as a self-contained image that any Multiboot loader starts: it puts memory and registers in place and
//! runs the case, which ends in HLT with interrupts off.

use crate::case::{Case, Layout, Piece, RAM};
use crate::window;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::descriptor::encode;
use umbra_arch::msr;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};

/// Where the image is loaded: above everything that cases have.
const LOAD: u64 = 0x80_0000;
const MAGIC: u32 = 0x1bad_b002;
/// The header gives addresses.
const ADDRESSES: u32 = 1 << 16;
const HEADER_BYTES: u64 = 32;

/// A case of which no image can be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It starts from a state that the starting code can't make.
    #[error("no image can start this case: {0}")]
    Unsupported(&'static str),
    /// The starting code doesn't assemble.
    #[error("the image's code: {0}")]
    Assemble(#[from] IcedError),
}

/// Where the last part of the starting code lies, which runs with the case's own page tables.
#[derive(Clone, Copy)]
struct Launch {
    /// One-to-one mapped while paging is switched on.
    enter: u64,
    /// Linear and physical address of the rest, and of its data.
    linear: u64,
    physical: u64,
    /// Linear and physical address of an XSAVE area.
    fp: Option<(u64, u64)>,
    /// Address of an entry that maps the low memory one to one, itself included, and that goes again.
    scaffold: Option<u64>,
}

const RING0: Launch = Launch { enter: 0x6000, linear: 0x6200, physical: 0x6200, fp: None, scaffold: None };

/// The image of a case.
///
/// # Errors
/// [`ImageError`].
pub fn build(case: &Case) -> Result<Vec<u8>, ImageError> {
    let launch = match case.layout {
        Layout::Ring0(_) => RING0,
        Layout::Window(_) => window::launch().into(),
        Layout::Blank => return Err(ImageError::Unsupported("it has a layout of its own")),
    };
    let long = case.state.efer.lma();
    let mut pieces: Vec<Piece> = case.layout.pieces().to_vec();
    pieces.extend(system_descriptors(case, launch));
    pieces.extend(case.pieces().map(|(gpa, bytes)| Piece { gpa, bytes: bytes.into_owned() }));
    pieces.push(Piece { gpa: launch.enter, bytes: enter(case, launch)? });
    let code = if long { launch64(case, launch)? } else { launch32(case, launch)? };
    pieces.push(Piece { gpa: launch.physical + TABLE_BYTES, bytes: code });
    pieces.push(Piece { gpa: launch.physical, bytes: pointers(case) });
    if let Some((_, physical)) = launch.fp {
        pieces.push(Piece { gpa: physical, bytes: fp_area(case) });
    }
    flat(&pieces, launch.enter)
}

impl From<window::Launch> for Launch {
    fn from(of: window::Launch) -> Self {
        let window::Launch { enter, linear, physical, fp, scaffold } = of;
        Launch { enter, linear, physical, fp: Some(fp), scaffold: Some(scaffold) }
    }
}

/// Header, copying code, then the pieces.
fn flat(pieces: &[Piece], enter: u64) -> Result<Vec<u8>, ImageError> {
    let mut starts = vec![0u64; pieces.len()];
    // The code's length doesn't depend on the addresses in it.
    for _ in 0..2 {
        let mut at = LOAD + HEADER_BYTES + copying(pieces, &starts, enter)?.len() as u64;
        for (start, piece) in starts.iter_mut().zip(pieces) {
            *start = at;
            at += piece.bytes.len() as u64;
        }
    }
    let code = copying(pieces, &starts, enter)?;
    let entry = (LOAD + HEADER_BYTES) as u32;
    let header =
        [MAGIC, ADDRESSES, 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES), LOAD as u32, LOAD as u32, 0, 0, entry];
    let mut image: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    image.extend(code);
    pieces.iter().for_each(|piece| image.extend(&piece.bytes));
    Ok(image)
}

fn copying(pieces: &[Piece], starts: &[u64], enter: u64) -> Result<Vec<u8>, ImageError> {
    let mut a = CodeAssembler::new(32)?;
    a.cld()?;
    // Firmware may have left a timer running.
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    // Firmware has left things where cases have zeros.
    a.xor(eax, eax)?;
    a.xor(edi, edi)?;
    a.mov(ecx, (RAM / 4) as u32)?;
    a.rep().stosd()?;
    for (piece, start) in pieces.iter().zip(starts) {
        a.mov(esi, *start as u32)?;
        a.mov(edi, piece.gpa as u32)?;
        a.mov(ecx, piece.bytes.len() as u32)?;
        a.rep().movsb()?;
    }
    a.mov(eax, enter as u32)?;
    a.jmp(eax)?;
    Ok(a.assemble(LOAD + HEADER_BYTES)?)
}

/// GDT and IDT pointers in front of the launching code, ten bytes each.
const TABLE_BYTES: u64 = 32;

fn pointers(case: &Case) -> Vec<u8> {
    let pointer = |t: TableRegister| [&t.limit.to_le_bytes()[..], &t.base.to_le_bytes()].concat();
    [pointer(case.state.gdtr), vec![0; 6], pointer(case.state.idtr)].concat()
}

/// The descriptors that LLDT and LTR load, and the entry that maps the starting code.
fn system_descriptors(case: &Case, launch: Launch) -> Vec<Piece> {
    let s = &case.state;
    // The GDT's physical address is as far from the launching code as the linear one.
    let gdt = s.gdtr.base.wrapping_sub(launch.linear).wrapping_add(launch.physical);
    let place = |segment: &Segment, kind: u32| {
        let low = encode(segment.base as u32, segment.limit, Attr(segment.attr.0 & !0xf | kind));
        let wide = s.efer.lma().then_some(segment.base >> 32);
        let bytes = [low].into_iter().chain(wide).flat_map(u64::to_le_bytes).collect();
        Piece { gpa: gdt + u64::from(segment.selector & !7), bytes }
    };
    let mut all = vec![place(&s.seg[Seg::Tr as usize], 9)];
    let ldt = &s.seg[Seg::Ldtr as usize];
    if ldt.selector != 0 {
        all.push(place(ldt, 2));
    }
    if let Some(entry) = launch.scaffold {
        all.push(Piece { gpa: entry, bytes: 0x83u64.to_le_bytes().to_vec() });
    }
    all
}

/// Standard-format XSAVE area.
fn fp_area(case: &Case) -> Vec<u8> {
    let fp = &case.state.fp;
    let mut bytes = Vec::new();
    bytes.extend(fp.fcw.to_le_bytes());
    bytes.extend(fp.fsw.to_le_bytes());
    bytes.extend([fp.ftw, 0]);
    bytes.extend(fp.fop.to_le_bytes());
    bytes.extend(fp.fip.to_le_bytes());
    bytes.extend(fp.fdp.to_le_bytes());
    bytes.extend(fp.mxcsr.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(fp.st.iter().chain(&fp.xmm).flatten().flat_map(|v| v.to_le_bytes()));
    bytes.resize(512, 0);
    bytes.push(7);
    bytes.resize(576, 0);
    bytes.extend(fp.ymm_high.iter().flatten().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// Switches paging on, one to one, and goes on in the case's code segment.
fn enter(case: &Case, launch: Launch) -> Result<Vec<u8>, ImageError> {
    let s = &case.state;
    let mut a = CodeAssembler::new(32)?;
    a.lgdt(ptr(launch.physical as u32))?;
    a.mov(eax, (s.cr4.raw() & (Cr4::PAE | Cr4::PSE)) as u32)?;
    a.mov(cr4, eax)?;
    a.mov(eax, Cr3::raw(s.cr3) as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, msr::IA32_EFER)?;
    a.mov(eax, (s.efer.raw() & !Efer::LMA) as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(eax, (s.cr0.raw() | Cr0::PE) as u32)?;
    a.mov(cr0, eax)?;
    let mut bytes = a.assemble(launch.enter)?;
    // Far jump: iced's assembler has none with both parts.
    bytes.push(0xea);
    bytes.extend(((launch.linear + TABLE_BYTES) as u32).to_le_bytes());
    bytes.extend(kernel_cs(case).to_le_bytes());
    Ok(bytes)
}

fn kernel_cs(case: &Case) -> u16 {
    if case.layout.is_window() { window::KERNEL_CS as u16 } else { case.state.seg[Seg::Cs as usize].selector }
}

fn launch64(case: &Case, launch: Launch) -> Result<Vec<u8>, ImageError> {
    let s = window::arm(case);
    let selector = |seg: Seg| u32::from(s.seg[seg as usize].selector);
    let mut a = CodeAssembler::new(64)?;
    a.lidt(ptr(launch.linear + 16))?;
    if let Some(entry) = launch.scaffold {
        a.mov(rax, entry)?;
        a.mov(qword_ptr(rax), 0)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
    }
    a.mov(eax, selector(Seg::Ldtr))?;
    a.lldt(ax)?;
    a.mov(eax, selector(Seg::Tr))?;
    a.ltr(ax)?;
    a.mov(rax, s.cr4.raw())?;
    a.mov(cr4, rax)?;
    if s.cr4.pke() {
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, s.pkru)?;
        a.wrpkru()?;
    }
    if let Some((linear, _)) = launch.fp {
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, s.xcr0 as u32)?;
        a.xsetbv()?;
        a.mov(rbx, linear)?;
        a.xrstor(ptr(rbx))?;
    }
    for (register, seg) in [(ds, Seg::Ds), (es, Seg::Es), (fs, Seg::Fs), (gs, Seg::Gs)] {
        a.mov(eax, selector(seg))?;
        a.mov(register, ax)?;
    }
    // IRET to where the case starts.
    a.mov(rsp, stack_of(case))?;
    for value in [selector(Seg::Ss).into(), s.gpr[4], s.rflags, selector(Seg::Cs).into(), s.rip] {
        a.mov(rax, value)?;
        a.push(rax)?;
    }
    let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    for (register, value) in registers.into_iter().zip(s.gpr).filter(|(register, _)| *register != rsp) {
        a.mov(register, value)?;
    }
    a.iretq()?;
    Ok(a.assemble(launch.linear + TABLE_BYTES)?)
}

/// A ring-0 stack for the launching code.
fn stack_of(case: &Case) -> u64 {
    if case.layout.is_window() { window::stack_end() } else { case.state.gpr[4] }
}

fn launch32(case: &Case, launch: Launch) -> Result<Vec<u8>, ImageError> {
    let s = &case.state;
    let selector = |seg: Seg| u32::from(s.seg[seg as usize].selector);
    let mut a = CodeAssembler::new(32)?;
    a.lidt(ptr(launch.linear as u32 + 16))?;
    for (register, seg) in [(ss, Seg::Ss), (ds, Seg::Ds), (es, Seg::Es), (fs, Seg::Fs), (gs, Seg::Gs)] {
        a.mov(eax, selector(seg))?;
        a.mov(register, ax)?;
    }
    a.mov(eax, selector(Seg::Ldtr))?;
    a.lldt(ax)?;
    a.mov(eax, selector(Seg::Tr))?;
    a.ltr(ax)?;
    a.mov(eax, s.cr4.raw() as u32)?;
    a.mov(cr4, eax)?;
    a.mov(esp, s.gpr[4] as u32)?;
    for value in [s.rflags as u32, selector(Seg::Cs), s.rip as u32] {
        a.mov(eax, value)?;
        a.push(eax)?;
    }
    for (register, value) in [eax, ecx, edx, ebx, esp, ebp, esi, edi].into_iter().zip(s.gpr) {
        if register != esp {
            a.mov(register, value as u32)?;
        }
    }
    a.iretd()?;
    Ok(a.assemble(launch.linear + TABLE_BYTES)?)
}
