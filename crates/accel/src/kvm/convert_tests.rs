//! Each field on its own: what a conversion forgets or mixes up shows.

use super::*;
use umbra_arch::fpu::FpState;

/// A state whose every field that KVM holds has a value of its own.
fn distinct() -> CpuState {
    let mut s = CpuState::reset();
    s.gpr = std::array::from_fn(|i| 0x1111 * (i as u64 + 1));
    (s.rip, s.rflags) = (0xffff_8000_0000_1234, rflags::FIXED | rflags::IF | rflags::CF);
    for (i, segment) in s.seg.iter_mut().enumerate() {
        let kind = if i >= 6 { 0x8b } else { 0x9093 + ((i as u32) << 13 & 0x6000) };
        *segment =
            Segment { base: 0x1000 * i as u64, limit: 0xfffff + i as u32, attr: Attr(kind), selector: 8 * i as u16 };
    }
    (s.gdtr, s.idtr) = (TableRegister { base: 0x5000, limit: 0x7f }, TableRegister { base: 0x6000, limit: 0xfff });
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET);
    (s.cr2, s.cr3, s.cr4) = (0x7777, Cr3::new(0x8000), Cr4::new(Cr4::PAE | Cr4::PGE));
    s.pdpte = [0x9001, 0xa001, 0xb001, 0xc001];
    (s.dr, s.dr6, s.dr7) = ([1, 2, 3, 4], 0xffff_0ff1, 0x401);
    (s.xcr0, s.pkru, s.cpl) = (0x207, 0x5555_aaaa, 0);
    (s.nmi_blocked, s.shadow) = (true, Shadow::Sti);
    let mut fp = FpState { fcw: 0x37f, fsw: 0x3900, ftw: 0x5a, fop: 0x7ab, mxcsr: 0x1fa1, ..FpState::default() };
    (fp.fip, fp.fdp) = (0x1_2345_6789, 0x9_8765_4321);
    fp.st = std::array::from_fn(|i| [0x1_0000_0001 * (i as u64 + 1), i as u64]);
    fp.xmm = std::array::from_fn(|i| [0x2_0000_0002 * (i as u64 + 1), !(i as u64)]);
    fp.ymm_high = std::array::from_fn(|i| [0x3_0000_0003 * (i as u64 + 1), 7 ^ i as u64]);
    s.fp = fp;
    s
}

fn back(s: &CpuState, offered: u64) -> CpuState {
    let mut found = CpuState::reset();
    regs_into(&regs_of(s), &mut found);
    sregs_into(&sregs_of(s, 0, 0), &mut found);
    debugregs_into(&debugregs_of(s), &mut found);
    xcrs_into(&xcrs_of(s), &mut found);
    events_into(&events_of(s), &mut found);
    xsave_into(&xsave_of(s, offered), &mut found, offered);
    found
}

#[test]
fn every_field_comes_back() {
    let s = distinct();
    assert_eq!(back(&s, 0x207), s);
    for shadow in [Shadow::None, Shadow::Sti, Shadow::MovSs] {
        let s = CpuState { shadow, ..distinct() };
        assert_eq!(back(&s, 0x207).shadow, shadow);
    }
}

#[test]
fn components_that_are_not_offered_stay_out() {
    let s = distinct();
    let found = back(&s, 0);
    assert_eq!((found.fp.xmm, found.fp.st), (s.fp.xmm, s.fp.st));
    assert_eq!((found.fp.ymm_high, found.pkru), ([[0; 2]; 16], 0));
    assert_eq!(get64(&xsave_of(&s, 0).region, 512), LEGACY);
}

#[test]
fn pdptes_go_with_pae_paging_only() {
    let mut s = distinct();
    s.efer = Efer::new(Efer::LMA | Efer::LME);
    assert_eq!((sregs_of(&s, 0, 0).flags, sregs_of(&s, 0, 0).pdptrs), (0, [0; 4]));
    assert_eq!(back(&s, 0x207).pdpte, [0; 4]);
}

#[test]
fn a_null_segment_keeps_selector_and_base_and_ss_carries_cpl() {
    let mut s = distinct();
    s.seg[Seg::Fs as usize] = Segment { base: 0x1234_5678, ..Segment::null(3) };
    s.seg[Seg::Ss as usize] = Segment::null(1);
    s.cpl = 1;
    assert_eq!(back(&s, 0x207), s);
    s.rflags |= rflags::VM;
    s.cpl = 3;
    assert_eq!(back(&s, 0x207).cpl, 3);
    s.cr0 = Cr0::new(Cr0::ET);
    assert_eq!(back(&s, 0x207).cpl, 0, "real mode");
}

#[test]
fn the_old_form_loses_nothing_but_pdptes() {
    let sregs = sregs_of(&distinct(), 5, 0xfee0_0900);
    assert_eq!(new_sregs(&old_sregs(&sregs)), kvm_sregs2 { flags: 0, pdptrs: [0; 4], ..sregs });
    assert_eq!(control_difference(&sregs, &sregs), None);
    for changed in [
        kvm_sregs2 { cr0: 1, ..sregs },
        kvm_sregs2 { cr3: 1, ..sregs },
        kvm_sregs2 { cr4: 1, ..sregs },
        kvm_sregs2 { efer: 1, ..sregs },
    ] {
        assert!(control_difference(&sregs, &changed).is_some());
    }
}

#[test]
fn events_that_no_state_holds_are_seen() {
    let mut events = events_of(&distinct());
    assert!(!is_event_pending(&events));
    events.exception.pending = 1;
    assert!(is_event_pending(&events));
    events = events_of(&distinct());
    events.interrupt.injected = 1;
    assert!(is_event_pending(&events));
}
