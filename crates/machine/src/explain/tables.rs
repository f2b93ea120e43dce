//! IDT gates, descriptors and task-state segments in text.

use super::Scene;
use super::registers::segment_text;
use std::fmt::Write;
use umbra_arch::descriptor::{Descriptor, Gate, system};
use umbra_arch::segment::{Attr, Seg};
use umbra_arch::state::reg;

/// Bytes of one gate in the mode in force.
pub(super) fn gate_size(scene: &Scene<'_>) -> u64 {
    match (scene.state.cr0.pe(), scene.state.efer.lma()) {
        (false, _) => 4,
        (true, false) => 8,
        (true, true) => 16,
    }
}

/// Whether the gate lies within the IDT's limit.
pub(super) fn gate_in_limit(scene: &Scene<'_>, vector: u8) -> bool {
    let size = gate_size(scene);
    u64::from(vector) * size + size - 1 <= u64::from(scene.state.idtr.limit)
}

/// Linear address of the gate; `None` beyond the IDT's limit.
pub(super) fn gate_address(scene: &Scene<'_>, vector: u8) -> Option<u64> {
    let at = u64::from(vector) * gate_size(scene);
    gate_in_limit(scene, vector).then(|| scene.state.idtr.base.wrapping_add(at))
}

/// The gate in protected mode; `None` if it can't be read.
pub(super) fn read_gate(scene: &Scene<'_>, vector: u8) -> Option<Gate> {
    let at = gate_address(scene, vector).filter(|_| scene.state.cr0.pe())?;
    let low = scene.qword(at)?;
    Some(if scene.state.efer.lma() { Gate::long(low, scene.qword(at.wrapping_add(8))?) } else { Gate::legacy(low) })
}

/// The descriptor that `selector` names; `None` if it is null, beyond the limit or unmapped.
pub(super) fn read_descriptor(scene: &Scene<'_>, selector: u16) -> Option<Descriptor> {
    let (base, limit) = if selector & 4 != 0 {
        let ldt = scene.state.segment(Seg::Ldtr);
        (ldt.base, u64::from(ldt.limit))
    } else {
        (scene.state.gdtr.base, u64::from(scene.state.gdtr.limit))
    };
    let offset = u64::from(selector & 0xfff8);
    if selector & 0xfffc == 0 || offset + 7 > limit {
        return None;
    }
    scene.qword(base.wrapping_add(offset)).map(Descriptor)
}

/// Linear address of the handler, with the code segment's base.
pub(super) fn handler(scene: &Scene<'_>, vector: u8) -> Option<u64> {
    let gate = read_gate(scene, vector).filter(|gate| gate.attr.is_present())?;
    let code = read_descriptor(scene, gate.selector)?;
    let base = if scene.state.efer.lma() { 0 } else { code.base() };
    Some(base.wrapping_add(gate.offset))
}

/// Where the delivery's first push goes below: linear address of the new stack's top.
pub(super) fn delivery_stack(scene: &Scene<'_>, vector: u8) -> Option<u64> {
    let s = scene.state;
    if !s.cr0.pe() {
        return Some(scene.stack());
    }
    let gate = read_gate(scene, vector)?;
    let tr = s.segment(Seg::Tr);
    let inner = read_descriptor(scene, gate.selector).is_some_and(|code| {
        let attr = code.attr();
        !attr.is_conforming() && attr.dpl() < s.cpl
    });
    let pointer = |offset: u64| scene.qword(tr.base.wrapping_add(offset));
    if s.efer.lma() {
        let rsp = match (gate.ist, inner) {
            (0, false) => s.gpr[reg::RSP],
            (0, true) => pointer(4)?,
            (ist, _) => pointer(0x24 + 8 * u64::from(ist - 1))?,
        };
        return Some(rsp & !15);
    }
    if inner { pointer(4).map(|pair| pair & 0xffff_ffff) } else { Some(scene.stack()) }
}

const fn gate_kind(attr: Attr) -> &'static str {
    if attr.is_code_or_data() {
        return "a code or data descriptor, no gate";
    }
    match attr.kind() {
        system::INTERRUPT_GATE => "interrupt gate",
        system::TRAP_GATE => "trap gate",
        system::INTERRUPT_GATE16 => "16-bit interrupt gate",
        system::TRAP_GATE16 => "16-bit trap gate",
        system::TASK_GATE => "task gate",
        system::CALL_GATE | system::CALL_GATE16 => "call gate",
        0 => "empty (type 0)",
        _ => "no gate",
    }
}

/// The IDT's entry for `vector`, with the code segment that it names.
pub(super) fn gate(scene: &Scene<'_>, vector: u8) -> String {
    let mut out = String::new();
    let Some(at) = gate_address(scene, vector) else {
        let limit = scene.state.idtr.limit;
        return format!("gate of vector {vector}: beyond the IDT's limit {limit:#x}\n");
    };
    if !scene.state.cr0.pe() {
        let entry = scene.qword(at).unwrap_or(0);
        let (segment, offset) = (entry >> 16 & 0xffff, entry & 0xffff);
        return format!("vector {vector} at {at:#x}: real-mode handler {segment:04x}:{offset:04x}\n");
    }
    let Some(gate) = read_gate(scene, vector) else {
        return format!("gate of vector {vector} at {at:#x}: can't be read\n");
    };
    // Writing to a String can't fail.
    let _ = write!(out, "gate of vector {vector} at {at:#x}: {}", gate_kind(gate.attr));
    if gate.attr.0 == 0 && gate.offset == 0 {
        out.push('\n');
        return out;
    }
    let present = if gate.attr.is_present() { "present" } else { "not present" };
    let ist = if gate.ist == 0 { String::new() } else { format!(", IST {}", gate.ist) };
    let _ =
        writeln!(out, ", {present}, DPL {}, handler {:#06x}:{:#x}{ist}", gate.attr.dpl(), gate.selector, gate.offset);
    let _ = match read_descriptor(scene, gate.selector) {
        Some(code) => {
            let text = segment_text(&code.segment(gate.selector));
            writeln!(out, "  its code segment {:#06x}: {text} ({:#018x})", gate.selector, code.0)
        }
        None => writeln!(out, "  its code segment {:#06x}: no such descriptor", gate.selector),
    };
    out
}

/// The stack pointers of the task-state segment.
pub(super) fn task_state(scene: &Scene<'_>) -> String {
    let tr = scene.state.segment(Seg::Tr);
    if !scene.state.cr0.pe() {
        return String::new();
    }
    if tr.selector & 0xfffc == 0 {
        return "TSS: TR was never loaded\n".into();
    }
    let mut out = format!("TSS {:04x} at {:#x}, limit {:#x}:", tr.selector, tr.base, tr.limit);
    let long = scene.state.efer.lma();
    let names: &[(&str, u64)] = if long {
        &[("RSP0", 4), ("RSP1", 12), ("RSP2", 20), ("IST1", 0x24), ("IST2", 0x2c), ("IST3", 0x34), ("IST4", 0x3c)]
    } else {
        &[("SS0:ESP0", 4), ("SS1:ESP1", 12), ("SS2:ESP2", 20)]
    };
    for &(name, offset) in names {
        let value = scene.qword(tr.base.wrapping_add(offset));
        let text = match (value, long) {
            _ if offset + 7 > u64::from(tr.limit) => "beyond the limit".to_owned(),
            (None, _) => "can't be read".to_owned(),
            (Some(value), true) => format!("{value:#x}"),
            (Some(value), false) => format!("{:04x}:{:#x}", value >> 32 & 0xffff, value & 0xffff_ffff),
        };
        let _ = write!(out, " {name} {text}");
    }
    out.push('\n');
    out
}
