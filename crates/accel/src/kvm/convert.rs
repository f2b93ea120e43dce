//! [`CpuState`] in KVM's structures and back. Nothing here talks to the kernel.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs,
    kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::xsave::component;
use umbra_arch::fpu::FpState;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::state::Shadow;
use umbra_arch::{CpuState, rflags};

/// KVM's numbers for interrupt shadows.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
/// XSTATE_BV in an XSAVE area, in 32-bit words.
const XSTATE_BV: usize = 512 / 4;
/// Components that a legacy area holds.
const LEGACY: u64 = 3;

/// Applies `$copy!(kvm field, index in CpuState::gpr)` to the sixteen registers.
macro_rules! each_register {
    ($copy:ident) => {
        $copy!(rax 0, rcx 1, rdx 2, rbx 3, rsp 4, rbp 5, rsi 6, rdi 7, r8 8, r9 9, r10 10, r11 11, r12 12, r13 13, r14 14, r15 15)
    };
}

pub(super) fn regs_of(s: &CpuState) -> kvm_regs {
    let mut regs = kvm_regs { rip: s.rip, rflags: s.rflags, ..Default::default() };
    macro_rules! copy {
        ($($name:ident $index:literal),*) => { $(regs.$name = s.gpr[$index];)* };
    }
    each_register!(copy);
    regs
}

pub(super) fn regs_into(regs: &kvm_regs, s: &mut CpuState) {
    macro_rules! copy {
        ($($name:ident $index:literal),*) => { $(s.gpr[$index] = regs.$name;)* };
    }
    each_register!(copy);
    s.rip = regs.rip;
    s.rflags = regs.rflags & rflags::WRITABLE | rflags::FIXED;
}

fn segment_of(segment: &Segment) -> kvm_segment {
    let attr = segment.attr;
    let unusable = attr.is_unusable();
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: attr.kind(),
        present: (attr.is_present() && !unusable).into(),
        dpl: attr.dpl(),
        db: attr.is_big().into(),
        s: attr.is_code_or_data().into(),
        l: attr.is_long().into(),
        g: attr.is_granular().into(),
        avl: (attr.0 >> 12 & 1) as u8,
        unusable: unusable.into(),
        padding: 0,
    }
}

/// An unusable register keeps only selector and base, so that equal states compare equal.
fn segment_from(k: &kvm_segment) -> Segment {
    if k.unusable != 0 || k.present == 0 {
        return Segment { base: k.base, ..Segment::null(k.selector) };
    }
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    let attr = u32::from(k.type_ & 15)
        | bit(k.s, 4)
        | u32::from(k.dpl & 3) << 5
        | bit(k.present, 7)
        | bit(k.avl, 12)
        | bit(k.l, 13)
        | bit(k.db, 14)
        | bit(k.g, 15);
    Segment { base: k.base, limit: k.limit, attr: Attr(attr), selector: k.selector }
}

/// The state's system registers, with the local APIC's part of them.
pub(super) fn sregs_of(s: &CpuState, cr8: u8, apic_base: u64) -> kvm_sregs2 {
    let segment = |seg: Seg| segment_of(s.segment(seg));
    let table = |t: &TableRegister| kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] };
    let mut ss = segment(Seg::Ss);
    if s.cr0.pe() && !s.is_v86() {
        // KVM takes CPL from here, also where SS holds a null selector.
        ss.dpl = s.cpl;
    }
    let pae = s.cr0.pg() && s.cr4.pae() && !s.efer.lma();
    kvm_sregs2 {
        cs: segment(Seg::Cs),
        ds: segment(Seg::Ds),
        es: segment(Seg::Es),
        fs: segment(Seg::Fs),
        gs: segment(Seg::Gs),
        ss,
        tr: segment(Seg::Tr),
        ldt: segment(Seg::Ldtr),
        gdt: table(&s.gdtr),
        idt: table(&s.idtr),
        cr0: s.cr0.raw(),
        cr2: s.cr2,
        cr3: s.cr3.raw(),
        cr4: s.cr4.raw(),
        cr8: cr8.into(),
        efer: s.efer.raw(),
        apic_base,
        flags: if pae { KVM_SREGS2_FLAGS_PDPTRS_VALID.into() } else { 0 },
        pdptrs: if pae { s.pdpte } else { [0; 4] },
    }
}

/// CPL comes with them; PDPTEs only in PAE paging.
pub(super) fn sregs_into(k: &kvm_sregs2, s: &mut CpuState) {
    let table = |t: &kvm_dtable| TableRegister { base: t.base, limit: t.limit };
    let segments = [&k.es, &k.cs, &k.ss, &k.ds, &k.fs, &k.gs, &k.ldt, &k.tr];
    s.seg = segments.map(segment_from);
    (s.gdtr, s.idtr) = (table(&k.gdt), table(&k.idt));
    (s.cr0, s.cr2, s.cr3) = (Cr0::new(k.cr0), k.cr2, Cr3::new(k.cr3));
    (s.cr4, s.efer) = (Cr4::new(k.cr4), Efer::new(k.efer));
    if k.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
        s.pdpte = k.pdptrs;
    }
    s.cpl = match (s.cr0.pe(), s.is_v86()) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => k.ss.dpl & 3,
    };
}

/// What differs in the control registers, if anything, in words.
pub(super) fn control_difference(wanted: &kvm_sregs2, found: &kvm_sregs2) -> Option<String> {
    let registers = [
        ("CR0", wanted.cr0, found.cr0),
        ("CR3", wanted.cr3, found.cr3),
        ("CR4", wanted.cr4, found.cr4),
        ("EFER", wanted.efer, found.efer),
    ];
    let (name, wanted, found) = registers.into_iter().find(|(_, wanted, found)| wanted != found)?;
    Some(format!("{name} {wanted:#x} became {found:#x}"))
}

/// A struct with the registers that both versions of the call have, and fields of its own.
macro_rules! sregs_like {
    ($from:expr, $to:ident { $($own:tt)* }) => {
        $to {
            cs: $from.cs,
            ds: $from.ds,
            es: $from.es,
            fs: $from.fs,
            gs: $from.gs,
            ss: $from.ss,
            tr: $from.tr,
            ldt: $from.ldt,
            gdt: $from.gdt,
            idt: $from.idt,
            cr0: $from.cr0,
            cr2: $from.cr2,
            cr3: $from.cr3,
            cr4: $from.cr4,
            cr8: $from.cr8,
            efer: $from.efer,
            apic_base: $from.apic_base,
            $($own)*
        }
    };
}

/// For kernels without KVM_SET_SREGS2: the same without PDPTEs, which KVM then loads from memory.
pub(super) fn old_sregs(k: &kvm_sregs2) -> kvm_sregs {
    sregs_like!(k, kvm_sregs { interrupt_bitmap: [0; 4] })
}

pub(super) fn new_sregs(k: &kvm_sregs) -> kvm_sregs2 {
    sregs_like!(k, kvm_sregs2 { flags: 0, pdptrs: [0; 4] })
}

pub(super) fn debugregs_of(s: &CpuState) -> kvm_debugregs {
    kvm_debugregs { db: s.dr, dr6: s.dr6, dr7: s.dr7, ..Default::default() }
}

pub(super) fn debugregs_into(k: &kvm_debugregs, s: &mut CpuState) {
    (s.dr, s.dr6, s.dr7) = (k.db, k.dr6, k.dr7);
}

pub(super) fn xcrs_of(s: &CpuState) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = s.xcr0;
    xcrs
}

/// XCR0, which is the only one.
pub(super) fn xcrs_into(k: &kvm_xcrs, s: &mut CpuState) {
    if let Some(xcr0) = k.xcrs.iter().take(k.nr_xcrs as usize).find(|xcr| xcr.xcr == 0) {
        s.xcr0 = xcr0.value;
    }
}

/// Nothing is pending in a state of ours; shadows and blocked NMIs are what there is to say.
pub(super) fn events_of(s: &CpuState) -> kvm_vcpu_events {
    let mut events =
        kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    events.nmi.masked = s.nmi_blocked.into();
    events.interrupt.shadow = match s.shadow {
        Shadow::None => 0,
        Shadow::Sti => SHADOW_STI,
        Shadow::MovSs => SHADOW_MOV_SS,
    };
    events
}

pub(super) fn events_into(k: &kvm_vcpu_events, s: &mut CpuState) {
    s.nmi_blocked = k.nmi.masked != 0;
    s.shadow = match k.interrupt.shadow {
        shadow if shadow & SHADOW_MOV_SS != 0 => Shadow::MovSs,
        shadow if shadow & SHADOW_STI != 0 => Shadow::Sti,
        _ => Shadow::None,
    };
}

/// Whether KVM holds an exception or interrupt that the guest hasn't seen yet and no state of ours can hold.
pub(super) fn is_event_pending(k: &kvm_vcpu_events) -> bool {
    [k.exception.injected, k.exception.pending, k.interrupt.injected, k.nmi.injected].iter().any(|event| *event != 0)
}

fn put64(area: &mut [u32], at: usize, value: u64) {
    if let Some([low, high]) = area.get_mut(at / 4..at / 4 + 2) {
        (*low, *high) = (value as u32, (value >> 32) as u32);
    }
}

fn get64(area: &[u32], at: usize) -> u64 {
    let word = |index| u64::from(area.get(index).copied().unwrap_or(0));
    word(at / 4) | word(at / 4 + 1) << 32
}

/// Applies `$each(byte offset, 64-bit value)` to everything in an FXSAVE area but its first 16 bytes and MXCSR.
fn wide_fields(fp: &mut FpState) -> impl Iterator<Item = (usize, &mut u64)> {
    let st = fp.st.iter_mut().flatten().enumerate().map(|(i, value)| (32 + 8 * i, value));
    let xmm = fp.xmm.iter_mut().flatten().enumerate().map(|(i, value)| (160 + 8 * i, value));
    st.chain(xmm)
}

/// The x87, SSE, AVX and PKRU registers as an XSAVE area in standard format with the components `offered`.
pub(super) fn xsave_of(s: &CpuState, offered: u64) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    let area = &mut xsave.region[..];
    let mut fp = s.fp;
    area[0] = u32::from(fp.fcw) | u32::from(fp.fsw) << 16;
    area[1] = u32::from(fp.ftw) | u32::from(fp.fop) << 16;
    put64(area, 8, fp.fip);
    put64(area, 16, fp.fdp);
    area[6] = fp.mxcsr;
    wide_fields(&mut fp).for_each(|(at, value)| put64(area, at, *value));
    let selected = offered | LEGACY;
    put64(area, 4 * XSTATE_BV, selected);
    if let Some(avx) = component(2).filter(|_| selected >> 2 & 1 != 0) {
        let values = fp.ymm_high.iter().flatten().enumerate();
        values.for_each(|(i, value)| put64(area, avx.offset as usize + 8 * i, *value));
    }
    if let Some(pkru) = component(9).filter(|_| selected >> 9 & 1 != 0) {
        area[pkru.offset as usize / 4] = s.pkru;
    }
    xsave
}

pub(super) fn xsave_into(xsave: &kvm_xsave, s: &mut CpuState, offered: u64) {
    let area = &xsave.region[..];
    let present = get64(area, 4 * XSTATE_BV);
    let fp = &mut s.fp;
    (fp.fcw, fp.fsw) = (area[0] as u16, (area[0] >> 16) as u16);
    (fp.ftw, fp.fop) = (area[1] as u8, (area[1] >> 16) as u16);
    (fp.fip, fp.fdp, fp.mxcsr) = (get64(area, 8), get64(area, 16), area[6]);
    wide_fields(fp).for_each(|(at, value)| *value = get64(area, at));
    if let Some(avx) = component(2).filter(|_| offered >> 2 & 1 != 0) {
        // A component in its initial state may be left out of the area.
        let held = present >> 2 & 1 != 0;
        let values = fp.ymm_high.iter_mut().flatten().enumerate();
        values.for_each(|(i, value)| *value = if held { get64(area, avx.offset as usize + 8 * i) } else { 0 });
    }
    if let Some(pkru) = component(9).filter(|_| offered >> 9 & 1 != 0) {
        s.pkru = if present >> 9 & 1 != 0 { area[pkru.offset as usize / 4] } else { 0 };
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
