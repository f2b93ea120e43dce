//! What happens in random sequences, and how it is drawn.

use crate::manual::Kind;
use crate::support::*;
use proptest::prelude::*;
use umbra_arch::control::{Cr0, Cr4, Efer};

/// All tables and data lie in this many pages from `ARENA` on, so that tables map tables.
pub const PAGES: u64 = 20;
pub const ARENA: u64 = 0x20_0000;
/// Pages that CR3 selects; the last holds PDPTEs without reserved bits.
pub const ROOTS: u64 = 4;
pub const PDPT: u64 = ARENA + ((ROOTS - 1) << 12);

#[derive(Clone, Debug)]
pub enum Op {
    MovCr0(u64),
    MovCr3 {
        page: u64,
        bits: u64,
    },
    MovCr4(u64),
    Efer(u64),
    FarJump {
        long: bool,
    },
    View {
        cpl: u8,
        ac: bool,
    },
    Pkru(u32),
    Pkrs(u32),
    Invlpg(u64),
    Invpcid {
        kind: u64,
        pcid: u64,
        gva: u64,
    },
    Access {
        gva: u64,
        kind: Kind,
        implicit: bool,
    },
    /// An instruction's store to a linear address.
    Store {
        gva: u64,
        target: u64,
        flags: u64,
    },
    /// Part of an entry, from `skew` bytes before it on, by a device or by this processor.
    Entry {
        page: u64,
        index: u64,
        target: u64,
        flags: u64,
        width: usize,
        skew: u64,
        own: bool,
    },
    /// A device's long write.
    Dma {
        page: u64,
        offset: u64,
        bytes: usize,
        target: u64,
    },
    HostEfer(u64),
    HostRegisters {
        cr0: u64,
        cr4: u64,
        efer: u64,
        page: u64,
    },
    Init,
    Cpuid {
        maxphyaddr: u32,
        gib_pages: bool,
        amd: bool,
    },
    Code {
        page: u64,
    },
    Clean {
        page: u64,
    },
    Environment {
        smm: bool,
        guest: bool,
    },
    DropContexts,
    DropShadow,
    /// Good tables again, and this mode: long sequences would end in ruins.
    Afresh(Start),
}

/// The mode that a sequence starts in.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    Long,
    FiveLevel,
    Pae,
    TwoLevel,
}

fn flags() -> impl Strategy<Value = u64> {
    let rare = |bit: u64| prop_oneof![15 => Just(0), 1 => Just(bit)];
    let often = |bit: u64| prop_oneof![1 => Just(0), 4 => Just(bit)];
    let even = |bit: u64| prop_oneof![1 => Just(0), 1 => Just(bit)];
    let key = prop_oneof![3 => Just(0u64), 1 => (0u64..4).prop_map(|k| k << 59)];
    (
        (prop_oneof![1 => Just(0), 15 => Just(P)], often(W), even(U), even(A), even(D), rare(PS), even(G)),
        (rare(XD), rare(1 << 51), rare(1 << 45), rare(1 << 13), key),
    )
        .prop_map(|(a, b)| a.0 | a.1 | a.2 | a.3 | a.4 | a.5 | a.6 | b.0 | b.1 | b.2 | b.3 | b.4)
}

/// Few indices, so that paths meet.
fn gva() -> impl Strategy<Value = u64> {
    let index = || prop_oneof![4 => 0u64..2, 1 => 2u64..4];
    let high = prop_oneof![6 => Just(0u64), 1 => Just(0xffff_8000_0000_0000), 1 => Just(1 << 48)];
    let anywhere = (index(), index(), index(), index(), 0u64..4096, high)
        .prop_map(|(a, b, c, d, offset, high)| high | a << 39 | b << 30 | c << 21 | d << 12 | offset);
    // And a few that are met again and again.
    prop_oneof![anywhere, prop::sample::select(vec![0u64, 0x1000, 0x20_0008, 1 << 30])]
}

fn cr0_bit() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(Cr0::WP), 2 => Just(Cr0::PG), 1 => Just(Cr0::CD)]
}

/// One bit, sometimes two at a time.
fn cr4_bits() -> impl Strategy<Value = u64> {
    let bits =
        [Cr4::SMEP, Cr4::SMAP, Cr4::PKE, Cr4::PKS, Cr4::PGE, Cr4::PSE, Cr4::PAE, Cr4::LA57, Cr4::PCIDE, Cr4::CET];
    let one = || prop::sample::select(bits.to_vec());
    prop_oneof![4 => one(), 1 => (one(), one()).prop_map(|(a, b)| a | b)]
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Read), Just(Kind::Write), Just(Kind::Fetch)]
}

fn page() -> impl Strategy<Value = u64> {
    0..PAGES
}

fn edit() -> impl Strategy<Value = Op> {
    let index = prop_oneof![8 => 0u64..4, 1 => Just(256u64), 1 => 1u64..512];
    let width = prop_oneof![6 => Just(8usize), 1 => Just(4), 1 => Just(1), 1 => Just(2), 1 => Just(16)];
    let skew = prop_oneof![6 => Just(0u64), 1 => 0u64..8];
    prop_oneof![
        10 => (page(), index, page(), flags(), width, skew, any::<bool>()).prop_map(
            |(page, index, target, flags, width, skew, own)| Op::Entry { page, index, target, flags, width, skew, own }
        ),
        1 => (page(), 0u64..4096, 1usize..6000, page())
            .prop_map(|(page, offset, bytes, target)| Op::Dma { page, offset, bytes, target }),
    ]
}

fn register() -> impl Strategy<Value = Op> {
    let cr3_bits =
        prop_oneof![4 => Just(0u64), 2 => Just(1u64 << 63), 1 => Just(1), 1 => Just(1 << 63 | 1), 1 => Just(0x20)];
    prop_oneof![
        4 => cr0_bit().prop_map(Op::MovCr0),
        4 => (0..ROOTS, cr3_bits).prop_map(|(page, bits)| Op::MovCr3 { page, bits }),
        4 => cr4_bits().prop_map(Op::MovCr4),
        2 => prop_oneof![3 => Just(Efer::NXE), 2 => Just(Efer::LME), 1 => Just(Efer::LMA), 1 => Just(1 << 13)].prop_map(Op::Efer),
        1 => any::<bool>().prop_map(|long| Op::FarJump { long }),
        4 => (prop_oneof![Just(0u8), Just(3)], any::<bool>()).prop_map(|(cpl, ac)| Op::View { cpl, ac }),
        1 => any::<u32>().prop_map(|v| Op::Pkru(v & 0xff)),
        1 => any::<u32>().prop_map(|v| Op::Pkrs(v & 0xff)),
        2 => gva().prop_map(Op::Invlpg),
        1 => (0u64..5, prop_oneof![3 => Just(0u64), 2 => Just(1), 1 => Just(0x1000)], gva())
            .prop_map(|(kind, pcid, gva)| Op::Invpcid { kind, pcid, gva }),
    ]
}

fn host() -> impl Strategy<Value = Op> {
    let maxphyaddr = prop_oneof![4 => Just(40u32), 1 => Just(36), 1 => Just(46), 1 => Just(52)];
    prop_oneof![
        prop_oneof![Just(Efer::NXE), Just(Efer::LME)].prop_map(Op::HostEfer),
        (cr0_bit(), cr4_bits(), prop_oneof![Just(0), Just(Efer::LME | Efer::LMA), Just(Efer::NXE)], 0..ROOTS)
            .prop_map(|(cr0, cr4, efer, page)| Op::HostRegisters { cr0, cr4, efer, page }),
        Just(Op::Init),
        (maxphyaddr, any::<bool>(), any::<bool>()).prop_map(|(maxphyaddr, gib_pages, amd)| Op::Cpuid {
            maxphyaddr,
            gib_pages,
            amd
        }),
        page().prop_map(|page| Op::Code { page }),
        page().prop_map(|page| Op::Clean { page }),
        (any::<bool>(), any::<bool>()).prop_map(|(smm, guest)| Op::Environment { smm, guest }),
        Just(Op::DropContexts),
        Just(Op::DropShadow),
    ]
}

pub fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => edit(),
        16 => register(),
        4 => host(),
        22 => (gva(), kind(), prop_oneof![5 => Just(false), 1 => Just(true)])
            .prop_map(|(gva, kind, implicit)| Op::Access { gva, kind, implicit }),
        1 => start().prop_map(Op::Afresh),
        4 => (gva(), page(), flags()).prop_map(|(gva, target, flags)| Op::Store { gva: gva & !7, target, flags }),
    ]
}

/// The processor that acts, and what it does.
pub fn steps() -> impl Strategy<Value = Vec<(usize, Op)>> {
    prop::collection::vec((0..2usize, op()), 1..120)
}

pub fn start() -> impl Strategy<Value = Start> {
    prop_oneof![2 => Just(Start::Long), 1 => Just(Start::FiveLevel), 1 => Just(Start::Pae), 1 => Just(Start::TwoLevel)]
}
