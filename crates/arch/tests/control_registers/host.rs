//! Host-initiated writes.

use crate::predictor::{bit, combinations, each_rule_mattered, judge, limits, rules};
use umbra_arch::control::{BadControlRegs, ControlRegs, Cr0, Cr3, Cr4, Efer, FlushScope};

#[test]
fn host_writes_of_efer_ask_nobody_and_keep_lma() {
    for (old, value) in [(0x500, 0), (0, 0x500), (0xd00, u64::MAX)] {
        let regs = ControlRegs { cr0: Cr0::new(0x8000_0011), efer: Efer::new(old), ..ControlRegs::default() };
        let effects = regs.host_write_efer(value);
        assert_eq!(effects.regs.efer.raw(), value & !bit(10) | old & bit(10));
        assert_eq!(effects.flush, FlushScope::All);
    }
}

struct Replacement {
    new: ControlRegs,
    cs_long: bool,
}

#[test]
fn host_replacement() {
    let mut rules = rules::<Replacement>(&[
        ("CR0 high", |r| r.new.cr0.raw() >> 32 != 0),
        ("NW without CD", |r| r.new.cr0.raw() & (bit(29) | bit(30)) == bit(29)),
        ("PG without PE", |r| r.new.cr0.raw() & (bit(31) | bit(0)) == bit(31)),
        ("CR4 reserved", |r| r.new.cr4.raw() & bit(13) != 0),
        ("EFER reserved", |r| r.new.efer.raw() & bit(12) != 0),
        ("LMA differs from LME and PG", |r| {
            let long = r.new.efer.raw() & bit(8) != 0 && r.new.cr0.raw() & bit(31) != 0;
            long != (r.new.efer.raw() & bit(10) != 0)
        }),
        ("long mode without PAE", |r| {
            let long = r.new.efer.raw() & bit(8) != 0 && r.new.cr0.raw() & bit(31) != 0;
            long && r.new.cr4.raw() & bit(5) == 0
        }),
        ("CS.L outside long mode", |r| {
            r.cs_long && !(r.new.efer.raw() & bit(8) != 0 && r.new.cr0.raw() & bit(31) != 0)
        }),
        ("CR3 beyond MAXPHYADDR", |r| {
            let long = r.new.efer.raw() & bit(8) != 0 && r.new.cr0.raw() & bit(31) != 0;
            long && r.new.cr3.raw() & bit(50) != 0
        }),
    ]);
    for cr0 in combinations(&[0, 16, 29, 30, 31, 33]) {
        // PCIDE, LA57 and CET are not asked about: such states must be survived.
        for cr4 in combinations(&[5, 12, 13, 17, 23]) {
            for efer in combinations(&[8, 10, 12]) {
                for (cr3, cs_long) in [(0x1005, false), (0x1005, true), (bit(50), false)] {
                    let new = ControlRegs {
                        cr0: Cr0::new(cr0),
                        cr3: Cr3::new(cr3),
                        cr4: Cr4::new(cr4),
                        efer: Efer::new(efer),
                        pdpte: [1, 2, 3, 4],
                    };
                    let result = ControlRegs::default().host_replace(new, cs_long, &limits());
                    let refused = judge(&mut rules, &Replacement { new, cs_long });
                    assert_eq!(result.is_err(), refused, "{new:x?} {cs_long}");
                    if let Ok(effects) = result {
                        assert_eq!((effects.regs, effects.flush, effects.forget_pcids), (new, FlushScope::All, true));
                    }
                }
            }
        }
    }
    each_rule_mattered(&rules);
}

#[test]
fn host_replacement_says_what_is_wrong() {
    let replace = |new| ControlRegs::default().host_replace(new, false, &limits());
    let zero = ControlRegs::default();
    let efer = ControlRegs { efer: Efer::new(bit(12) | bit(10)), ..zero };
    assert_eq!(replace(efer), Err(BadControlRegs::EferReserved(bit(12))));
    let cr4 = ControlRegs { cr4: Cr4::new(bit(13) | bit(5)), ..zero };
    assert_eq!(replace(cr4), Err(BadControlRegs::Cr4Reserved(bit(13))));
}
