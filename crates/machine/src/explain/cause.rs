//! Likely causes of a triple fault, as rules over the final state.

use super::code::decode;
use super::{Scene, fault, is_canonical, paging, tables};
use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register};
use umbra_arch::Fault;
use umbra_arch::control::Cr0;
use umbra_arch::exit::TripleFault;
use umbra_arch::fault::vector;
use umbra_arch::paging::{Access, AccessKind, PagingMode, pfec};
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;

/// Causes in words, first that of the first exception, then why it couldn't be handled.
pub(super) fn of_triple_fault(scene: &Scene<'_>, triple: &TripleFault) -> Vec<String> {
    let mut causes = Vec::new();
    match super::origin(triple) {
        // The error code of the first exception is the IDT's: the story began with another event.
        Some(event) => {
            let began = TripleFault { first: Fault { vector: event, code: None, address: 0 }, ..*triple };
            causes.extend(first(scene, &began));
            let why = delivery(scene, event);
            causes.extend(why.map(|why| format!("{} could not be handled: {why}", super::name_of(event))));
        }
        None => causes.extend(first(scene, triple)),
    }
    let delivery = delivery(scene, triple.first.vector);
    let double = delivery_of_double_fault(scene, triple, delivery.as_ref());
    causes.extend(delivery.map(|why| format!("{} could not be handled: {why}", triple.first.mnemonic())));
    causes.extend(double.map(|why| format!("#DF could not be handled either: {why}")));
    if causes.is_empty() {
        causes.push(format!("no rule fits; the first exception was {} at {:#x}", triple.first, triple.at.1));
    }
    causes
}

fn delivery_of_double_fault(scene: &Scene<'_>, triple: &TripleFault, first: Option<&String>) -> Option<String> {
    if triple.first.vector == vector::DF {
        return None;
    }
    delivery(scene, vector::DF).map(|why| if Some(&why) == first { "for the same reason".into() } else { why })
}

/// Why the first exception came.
fn first(scene: &Scene<'_>, triple: &TripleFault) -> Option<String> {
    let (at, fault) = (triple.at.1, triple.first);
    if let Some(entered) = handler_at(scene, at) {
        let who = format!("the handler of vector {entered} faults at its first instruction");
        return Some(match page_fault(scene, &fault) {
            Some(why) if fault.vector == vector::PF => format!("{who}: {why}"),
            _ => format!("{who} with {fault}"),
        });
    }
    let instruction = decode(scene, at).map(|(instruction, _)| instruction);
    match fault.vector {
        vector::PF => page_fault(scene, &fault),
        vector::UD => instruction.map(|i| undefined(scene, &i)),
        vector::NM => Some("an x87, MMX or SSE instruction while CR0.TS or CR0.EM is 1".into()),
        vector::GP => instruction.and_then(|i| protection(scene, &i, &fault)),
        vector::NP | vector::TS => selector_loaded(scene, &fault),
        vector::SS => stack(scene, &fault),
        vector::DE => Some("a division by zero, or its quotient doesn't fit".into()),
        _ => None,
    }
}

/// The vector whose handler starts at `rip`, if there is one.
fn handler_at(scene: &Scene<'_>, rip: u64) -> Option<u8> {
    if !scene.state.cr0.pe() || rip == 0 {
        return None;
    }
    (0..32).find(|&vector| {
        tables::read_gate(scene, vector).is_some_and(|gate| gate.attr.is_present() && gate.offset == rip)
    })
}

fn page_fault(scene: &Scene<'_>, fault: &Fault) -> Option<String> {
    let code = fault.code.unwrap_or(0);
    let s = scene.state;
    let access = fault::access_of(code);
    let lin = scene.linear(s.rip);
    let why = paging::failure(scene, fault.address, access);
    let fetch = code & pfec::I != 0 || code & (pfec::W | pfec::P) == 0 && fault.address.wrapping_sub(lin) < 15;
    if fetch && code & pfec::P == 0 {
        let mode = super::registers::mode_name(scene.control_regs().mode());
        let why = why.unwrap_or_default();
        return Some(format!(
            "the code itself at {:#x} is not mapped ({mode}, CR3 {:#x}): {why}. If paging was just turned on or CR3 \
             loaded, the new tables lack the page that this code runs in",
            fault.address,
            s.cr3.raw()
        ));
    }
    let what = match access.kind {
        AccessKind::Read => "read",
        AccessKind::Write => "write",
        AccessKind::Fetch => "fetch",
    };
    let near_null = if fault.address < 0x1000 { " (a null pointer?)" } else { "" };
    let stack = scene.stack();
    let on_stack = fault.address.wrapping_sub(stack.wrapping_sub(256)) < 512;
    let near_stack = if on_stack { " (the stack: was the stack pointer set up, or did it overflow?)" } else { "" };
    why.map(|why| format!("{what} of {:#x}{near_null}{near_stack}: {why}", fault.address))
}

fn undefined(scene: &Scene<'_>, i: &Instruction) -> String {
    let s = scene.state;
    let features = i.cpuid_features();
    let sse = features.iter().any(|f| {
        use CpuidFeature::*;
        matches!(f, SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA)
    });
    let avx = features.iter().any(|f| matches!(f, CpuidFeature::AVX | CpuidFeature::AVX2 | CpuidFeature::FMA));
    match i.mnemonic() {
        Mnemonic::INVALID => "the bytes are no instruction: did execution run into data?".into(),
        Mnemonic::Ud2 | Mnemonic::Ud0 | Mnemonic::Ud1 => {
            "UD2: the guest stopped itself (BUG, panic, unreachable)".into()
        }
        Mnemonic::Syscall | Mnemonic::Sysret if !s.efer.sce() => "SYSCALL or SYSRET while EFER.SCE is 0".into(),
        _ if sse && s.cr0.em() => "an SSE instruction while CR0.EM is 1".into(),
        _ if sse && !s.cr4.osfxsr() => "an SSE instruction while CR4.OSFXSR is 0".into(),
        _ if avx && !s.cr4.osxsave() => "an AVX instruction while CR4.OSXSAVE is 0".into(),
        _ if avx && s.xcr0 & 6 != 6 => "an AVX instruction while XCR0 doesn't enable SSE and AVX state".into(),
        _ => format!("{:?} is undefined here: this CPU model (--cpu) lacks it, or the mode forbids it", i.mnemonic()),
    }
}

fn protection(scene: &Scene<'_>, i: &Instruction, fault: &Fault) -> Option<String> {
    if fault.code.unwrap_or(0) != 0 {
        return selector_loaded(scene, fault);
    }
    if let Some(why) = control_write(scene, i) {
        return Some(why);
    }
    if let Some(address) = memory_address(scene, i) {
        if !is_canonical(scene, address) && scene.state.is_64bit_code() {
            return Some(format!("the memory operand's address {address:#x} is not canonical"));
        }
        let size = i.memory_size().size() as u64;
        let aligned =
            matches!(i.mnemonic(), Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa | Mnemonic::Movntdq)
                || i.memory_size().is_packed() && size == 16 && !unaligned(i);
        if aligned && size > 1 && address % size != 0 {
            return Some(format!("{:?} needs an address aligned to {size} bytes, this is {address:#x}", i.mnemonic()));
        }
        if scene.state.segment(Seg::Ds).attr.is_unusable() && !scene.state.is_64bit_code() {
            return Some("a data access through a null segment: was DS loaded?".into());
        }
    }
    if scene.state.cpl != 0 && is_privileged(i) {
        return Some(format!("{:?} needs CPL 0, this runs at CPL {}", i.mnemonic(), scene.state.cpl));
    }
    None
}

fn unaligned(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu)
}

fn is_privileged(i: &Instruction) -> bool {
    i.is_privileged() || matches!(i.mnemonic(), Mnemonic::Hlt | Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Wrmsr)
}

fn memory_address(scene: &Scene<'_>, i: &Instruction) -> Option<u64> {
    let operand = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)?;
    let s = scene.state;
    i.virtual_address(operand, 0, |register, _, _| match register {
        Register::ES | Register::CS | Register::SS | Register::DS if s.is_64bit_code() => Some(0),
        _ if register.is_segment_register() => Some(s.seg[register.number() & 7].base),
        _ if register.is_gpr() => {
            let value = s.gpr[register.number() & 15];
            Some(value & (u64::MAX >> (64 - 8 * register.size().clamp(1, 8))))
        }
        _ => None,
    })
}

/// What is wrong with a write of a control register or EFER.
fn control_write(scene: &Scene<'_>, i: &Instruction) -> Option<String> {
    let s = scene.state;
    if i.mnemonic() == Mnemonic::Wrmsr {
        let (msr, value) = (s.gpr[reg::RCX] as u32, s.gpr[reg::RDX] << 32 | s.gpr[reg::RAX] & 0xffff_ffff);
        if msr == umbra_arch::msr::IA32_EFER && s.cr0.pg() {
            return Some("EFER.LME can't change while CR0.PG is 1".into());
        }
        return Some(format!("WRMSR of {value:#x} to MSR {msr:#x}: no such MSR here, or a reserved bit is set"));
    }
    if i.mnemonic() == Mnemonic::Rdmsr {
        return Some(format!("RDMSR of MSR {:#x}: no such MSR here", s.gpr[reg::RCX] as u32));
    }
    if i.mnemonic() != Mnemonic::Mov || i.op_count() != 2 || !i.op1_register().is_gpr() {
        return None;
    }
    let value = s.gpr[i.op1_register().number() & 15];
    match i.op0_register() {
        Register::CR0 => Some(cr0_write(scene, value)),
        Register::CR3 if scene.control_regs().mode() == PagingMode::Pae => {
            Some("MOV to CR3 in PAE paging: a PDPTE has a reserved bit set (bits 8:5, 2:1 must be 0)".into())
        }
        Register::CR3 => Some(format!("MOV to CR3 of {value:#x}: address bits beyond MAXPHYADDR are set")),
        Register::CR4 if s.efer.lma() && value >> 5 & 1 == 0 => Some("CR4.PAE can't be cleared in IA-32e mode".into()),
        Register::CR4 if value & !scene.limits.cr4_allowed != 0 => {
            let bad = value & !scene.limits.cr4_allowed;
            Some(format!("MOV to CR4 of {value:#x}: this CPU model (--cpu) has no bits {bad:#x}"))
        }
        _ => None,
    }
}

fn cr0_write(scene: &Scene<'_>, value: u64) -> String {
    let s = scene.state;
    let new = Cr0::new(value);
    let turning_on = new.pg() && !s.cr0.pg();
    if new.pg() && !new.pe() {
        "CR0.PG can't be set without CR0.PE".into()
    } else if turning_on && s.efer.lme() && !s.cr4.pae() {
        "EFER.LME is 1 and CR4.PAE is 0: turning paging on needs CR4.PAE for long mode".into()
    } else if turning_on && s.efer.lme() && s.segment(Seg::Cs).attr.is_long() {
        "EFER.LME is 1 and the code segment has L = 1: paging must be turned on from a segment with L = 0".into()
    } else if turning_on && s.cr4.pae() && !s.efer.lme() {
        "PAE paging: a PDPTE that CR3 points to has a reserved bit set. If long mode was meant, EFER.LME is still 0"
            .into()
    } else if new.nw() && !new.cd() {
        "CR0.NW can't be set without CR0.CD".into()
    } else {
        format!("MOV to CR0 of {value:#x} is illegal here")
    }
}

/// What is wrong with the descriptor that an error code names.
fn selector_loaded(scene: &Scene<'_>, fault: &Fault) -> Option<String> {
    let code = fault.code.filter(|code| code & 2 == 0 && *code != 0)?;
    let selector = (code & 0xfffc) as u16;
    let Some(descriptor) = tables::read_descriptor(scene, selector) else {
        let limit = scene.state.gdtr.limit;
        return Some(format!(
            "selector {selector:#06x} names no descriptor (GDT limit {limit:#x}), or it isn't mapped"
        ));
    };
    let text = super::registers::segment_text(&descriptor.segment(selector));
    let zero = if descriptor.0 == 0 { ", the descriptor is all zero" } else { "" };
    Some(format!("selector {selector:#06x} can't be used so: {text}{zero}"))
}

fn stack(scene: &Scene<'_>, fault: &Fault) -> Option<String> {
    if fault.code.unwrap_or(0) != 0 {
        return selector_loaded(scene, fault);
    }
    let stack = scene.stack();
    let why = if is_canonical(scene, stack) { "is beyond its segment's limit" } else { "is not canonical" };
    Some(format!("the stack pointer {stack:#x} {why}"))
}

/// Why an exception with `vector` can't reach its handler; `None` if nothing is in its way.
fn delivery(scene: &Scene<'_>, vector: u8) -> Option<String> {
    let s = scene.state;
    let idtr = s.idtr;
    if !tables::gate_in_limit(scene, vector) {
        let need = (u64::from(vector) + 1) * tables::gate_size(scene) - 1;
        return Some(if idtr.limit == 0 || idtr.base == 0 && idtr.limit <= 0x3ff {
            format!("no IDT is loaded (IDTR base {:#x}, limit {:#x})", idtr.base, idtr.limit)
        } else {
            format!("the IDT's limit {:#x} is too small: vector {vector} needs {need:#x}", idtr.limit)
        });
    }
    if !s.cr0.pe() {
        return None;
    }
    let at = tables::gate_address(scene, vector)?;
    if let Some(why) = paging::failure(scene, at, Access::implicit(AccessKind::Read)) {
        return Some(format!("the IDT at {:#x} can't be read: gate at {at:#x}: {why}", idtr.base));
    }
    gate(scene, vector, at).or_else(|| code_segment(scene, vector)).or_else(|| delivery_stack(scene, vector))
}

fn gate(scene: &Scene<'_>, vector: u8, at: u64) -> Option<String> {
    let idtr = scene.state.idtr;
    let gate = tables::read_gate(scene, vector)?;
    if gate.attr.is_code_or_data() || !matches!(gate.attr.kind(), 5 | 6 | 7 | 0xe | 0xf) {
        if idtr.base == 0 && matches!(idtr.limit, 0x3ff | 0xffff) {
            return Some(format!("no IDT is loaded: IDTR still has real mode's base 0 and limit {:#x}", idtr.limit));
        }
        if scene.state.efer.lma() && legacy_gates(scene) {
            return Some("the IDT has 8-byte gates; in IA-32e mode gates have 16 bytes".into());
        }
        return Some(format!("the entry for vector {vector} at {at:#x} is no gate (not filled in?)"));
    }
    if scene.state.efer.lma() && matches!(gate.attr.kind(), 5..=7) {
        return Some(format!("vector {vector} has a 16-bit or task gate, which IA-32e mode doesn't allow"));
    }
    (!gate.attr.is_present()).then(|| format!("the gate of vector {vector} at {at:#x} is not present"))
}

/// Whether the IDT looks like one of 32-bit code.
fn legacy_gates(scene: &Scene<'_>) -> bool {
    let first: Vec<u64> = (0..8).filter_map(|n| scene.qword(scene.state.idtr.base.wrapping_add(n * 8))).collect();
    first.len() == 8 && first.iter().all(|low| matches!(low >> 40 & 0x1f, 0xe | 0xf) && low >> 47 & 1 == 1)
}

fn code_segment(scene: &Scene<'_>, vector: u8) -> Option<String> {
    let gate = tables::read_gate(scene, vector).filter(|gate| gate.attr.kind() != 5)?;
    let selector = gate.selector;
    if selector & 0xfffc == 0 {
        return Some(format!("the gate of vector {vector} has a null code selector"));
    }
    let Some(code) = tables::read_descriptor(scene, selector) else {
        let limit = scene.state.gdtr.limit;
        return Some(format!(
            "its code selector {selector:#06x} names no descriptor (GDT limit {limit:#x}) or isn't mapped"
        ));
    };
    let attr = code.attr();
    let lma = scene.state.efer.lma();
    let wrong = if !attr.is_code() {
        "is no code segment"
    } else if !attr.is_present() {
        "is not present"
    } else if lma && !attr.is_long() {
        "is not 64-bit (L = 0): in IA-32e mode handlers must be"
    } else if lma && attr.is_big() {
        "has both L and D set"
    } else if attr.dpl() > scene.state.cpl {
        "has a DPL above the CPL"
    } else {
        return None;
    };
    Some(format!("the handler's code segment {selector:#06x} {wrong}"))
}

fn delivery_stack(scene: &Scene<'_>, vector: u8) -> Option<String> {
    let Some(stack) = tables::delivery_stack(scene, vector) else {
        return Some("the new stack pointer can't be read from the TSS: was TR loaded?".into());
    };
    let gate = tables::read_gate(scene, vector)?;
    let source = match gate.ist {
        0 if tables::read_descriptor(scene, gate.selector).is_some_and(|c| c.attr().dpl() < scene.state.cpl) => {
            "from the TSS".to_owned()
        }
        0 => "the interrupted code's".to_owned(),
        ist => format!("IST{ist} of the TSS"),
    };
    if !is_canonical(scene, stack) {
        return Some(format!("its stack {stack:#x} ({source}) is not canonical"));
    }
    let why = paging::failure(scene, stack.wrapping_sub(8), Access::implicit(AccessKind::Write))?;
    Some(format!("its stack {stack:#x} ({source}) can't be written: {why}"))
}
