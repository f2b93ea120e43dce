//! Nanoseconds of the MMU's hot operations on this host; an argument selects by name.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;
use umbra_arch::control::{CodeContext, ControlLimits, ControlRegs, Cr0, Cr3, Cr4, Efer};
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{Gpa, Gva};
use umbra_memory::GuestMemory;
use umbra_mmu::{Mmu, MmuOptions};

const LIMITS: ControlLimits = ControlLimits { maxphyaddr: 40, cr4_allowed: !0, efer_allowed: !0 };
const ROOTS: u64 = 16;
const PAGES: u64 = 256;

fn root(i: u64) -> u64 {
    0x10_0000 + i * 0x4000
}

/// ROOTS address spaces, each with PAGES pages at 4 MiB.
fn build() -> (Mmu, ControlRegs) {
    let mem = Arc::new(GuestMemory::new(64 << 20).expect("64 MiB"));
    for i in 0..ROOTS {
        let (pml4, pdpt, pd, pt) = (root(i), root(i) + 0x1000, root(i) + 0x2000, root(i) + 0x3000);
        for (at, value) in [(pml4, pdpt), (pdpt, pd), (pd + 2 * 8, pt)] {
            mem.write(Gpa::new(at), &(value | 7).to_le_bytes());
        }
        for page in 0..PAGES {
            let leaf = (0x100_0000 + (i * PAGES + page) * 0x1000) | 0x63;
            mem.write(Gpa::new(pt + page * 8), &leaf.to_le_bytes());
        }
    }
    let mut mmu = Mmu::new(mem, LIMITS, MmuOptions::default());
    let regs = ControlRegs {
        cr0: Cr0::new(Cr0::PE | Cr0::PG | Cr0::WP | Cr0::ET),
        cr3: Cr3::new(root(0)),
        cr4: Cr4::new(Cr4::PAE | Cr4::SMEP | Cr4::SMAP),
        efer: Efer::new(Efer::LME | Efer::LMA | Efer::NXE),
        ..ControlRegs::default()
    };
    mmu.reset_to(&regs);
    (mmu, regs)
}

fn measure(name: &str, per_round: u64, mut round: impl FnMut()) {
    if std::env::args().nth(1).is_some_and(|wanted| !name.contains(&wanted)) {
        return;
    }
    let rounds = 1_000_000 / per_round;
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..rounds {
            round();
        }
        best = best.min(start.elapsed().as_nanos() as f64 / (rounds * per_round) as f64);
    }
    println!("{name:<44}{best:>8.1} ns");
}

fn main() {
    let (mut mmu, mut regs) = build();
    let read = Access::explicit(AccessKind::Read, 0);
    let gva = |page: u64| Gva::new(0x40_0000 + page * 0x1000);
    let touch =
        |mmu: &mut Mmu| (0..PAGES).for_each(|p| _ = mmu.translate(gva(p), Access::explicit(AccessKind::Write, 0)));
    touch(&mut mmu);
    measure("read lookup, hit", PAGES, || {
        (0..PAGES).for_each(|p| _ = black_box(mmu.lookup_read(black_box(gva(p)), 8).expect("hit")));
    });
    measure("write lookup, hit", PAGES, || {
        (0..PAGES).for_each(|p| _ = black_box(mmu.lookup_write(black_box(gva(p)), 8).expect("hit")));
    });
    measure("refill from the shadow tree", PAGES, || {
        (0..PAGES).for_each(|p| _ = black_box(mmu.translate(black_box(gva(p)), read)));
    });
    measure("guest walk and shadow fill, 256 pages", PAGES, || {
        mmu.drop_all_shadow();
        (0..PAGES).for_each(|p| _ = black_box(mmu.translate(black_box(gva(p)), read)));
    });
    measure("view switch (SYSCALL, STAC)", 2, || {
        mmu.set_view(black_box(3), false);
        mmu.set_view(black_box(0), false);
    });
    let mut absent = |_: Gpa| [0; 4];
    measure("CR0.WP write, legality and effects alone", 1, || {
        regs =
            regs.write_cr0(regs.cr0.raw() ^ Cr0::WP, CodeContext::default(), &LIMITS, &mut absent).expect("legal").regs;
        black_box(&regs);
    });
    measure("CR0.WP write", 1, || {
        let effects =
            regs.write_cr0(regs.cr0.raw() ^ Cr0::WP, CodeContext::default(), &LIMITS, &mut absent).expect("legal");
        regs = effects.regs;
        mmu.apply(&effects);
    });
    for roots in [2, 4, 16] {
        let mut next = 0;
        measure(&format!("CR3 write among {roots} roots"), 1, || {
            next = (next + 1) % roots;
            let effects = regs.write_cr3(root(next), &LIMITS, &mut absent).expect("legal");
            regs = effects.regs;
            mmu.apply(&effects);
        });
    }
    regs = regs.write_cr3(root(0), &LIMITS, &mut absent).map(|e| e.regs).expect("legal");
    mmu.reset_to(&regs);
    touch(&mut mmu);
    // The current top table is never retired, however often it is written.
    measure("store to an uncached table entry", 1, || mmu.table_written(Gpa::new(root(0) + 511 * 8), 8));
    measure("store that leaves a cached entry the same", 1, || mmu.table_written(Gpa::new(root(0)), 8));
    println!("\n{}", mmu.stats());
}
