//! A processor's paging registers and TLB by the manual: which writes are #GP, what a TLB may still hold afterwards,
//! and so the set of outcomes that an access may have.
//!
//! Uses nothing of the crates under test. The TLB keeps what accesses have used. Paging-structure caches and
//! speculative entries aren't modelled, so the set is smaller than the architecture's and the test the stricter.

use crate::manual::{self, Attempt, Form, Machine, Mapping, Memory};

/// #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused;

/// What a TLB entry is good for: its page in one PCID, in all of them if it is global.
#[derive(Clone, Copy, Debug)]
struct Cached {
    pcid: u64,
    linear: u64,
    mapping: Mapping,
}

/// Entries kept; the oldest goes first, as a TLB may drop what it likes.
const TLB: usize = 64;

pub struct Processor {
    pub machine: Machine,
    pub cs_long: bool,
    pub cpl: u8,
    /// CR4 and EFER bits that CPUID enumerates.
    pub cr4_offered: u64,
    pub efer_offered: u64,
    tlb: Vec<Cached>,
}

const fn on(register: u64, bit: u32) -> bool {
    register >> bit & 1 == 1
}

/// What an invalidation takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flush {
    Nothing,
    Everything,
    NonGlobal,
    NonGlobalOf(u64),
    AllOf(u64),
}

impl Processor {
    pub fn new(machine: Machine, cr4_offered: u64, efer_offered: u64) -> Self {
        Self { machine, cs_long: false, cpl: 0, cr4_offered, efer_offered, tlb: Vec::new() }
    }

    fn pcid(&self) -> u64 {
        if on(self.machine.cr4, 17) { self.machine.cr3 & 0xfff } else { 0 }
    }

    fn flush(&mut self, what: Flush) {
        self.tlb.retain(|cached| match what {
            Flush::Nothing => true,
            Flush::Everything => false,
            Flush::NonGlobal => cached.mapping.global,
            Flush::NonGlobalOf(pcid) => cached.pcid != pcid || cached.mapping.global,
            Flush::AllOf(pcid) => cached.pcid != pcid && !cached.mapping.global,
        });
    }

    /// The four PDPTEs that CR3 points to; #GP if a present one has a reserved bit: 2:1, 8:5 or from MAXPHYADDR on.
    fn pdptes<M: Memory>(machine: &Machine, memory: &M) -> Result<[u64; 4], Refused> {
        let at = machine.cr3 & 0xffff_ffe0;
        let loaded: [u64; 4] = std::array::from_fn(|i| memory.entry(at + 8 * i as u64, 8));
        let bad = |e: u64| on(e, 0) && (e & 0b1_1110_0110 != 0 || e >> machine.cpuid.maxphyaddr != 0);
        if loaded.iter().any(|&e| bad(e)) { Err(Refused) } else { Ok(loaded) }
    }

    /// Commits `new`, with PDPTEs from memory if `load` asks for them and PAE paging is in use then.
    fn commit<M: Memory>(&mut self, mut new: Machine, load: bool, memory: &M) -> Result<(), Refused> {
        if load && new.form() == Form::Pae {
            new.pdpte = Self::pdptes(&new, memory)?;
        }
        self.machine = new;
        Ok(())
    }

    /// "MOV-Move to/from Control Registers", and "Initializing IA-32e Mode" for LMA.
    pub fn mov_cr0<M: Memory>(&mut self, value: u64, memory: &M) -> Result<(), Refused> {
        const WRITABLE: u64 = 0xe005_002f;
        let old = self.machine;
        let new = value & WRITABLE | 1 << 4;
        let (was, will) = (on(old.cr0, 31), on(new, 31));
        let illegal = value > 0xffff_ffff
            || will && !on(new, 0)
            || on(new, 29) && !on(new, 30)
            || !on(new, 16) && on(old.cr4, 23)
            || !will && on(old.cr4, 17)
            || !will && self.cs_long && on(old.efer, 10);
        let activates = will && !was && on(old.efer, 8);
        if illegal || activates && (!on(old.cr4, 5) || self.cs_long) {
            return Err(Refused);
        }
        let lma = if !will {
            0
        } else if activates {
            1 << 10
        } else {
            old.efer & 1 << 10
        };
        let load = (old.cr0 ^ new) & 0xe000_0000 != 0;
        self.commit(Machine { cr0: new, efer: old.efer & !(1 << 10) | lma, ..old }, load, memory)?;
        self.flush(if was && !will { Flush::Everything } else { Flush::Nothing });
        Ok(())
    }

    pub fn mov_cr3<M: Memory>(&mut self, value: u64, memory: &M) -> Result<(), Refused> {
        let (long, pcide) = (on(self.machine.efer, 10), on(self.machine.cr4, 17));
        let keep = pcide && on(value, 63);
        let cr3 = if pcide { value & !(1 << 63) } else { value };
        if long && cr3 >> self.machine.cpuid.maxphyaddr != 0 {
            return Err(Refused);
        }
        let cr3 = if long { cr3 } else { cr3 & 0xffff_ffff };
        self.commit(Machine { cr3, ..self.machine }, true, memory)?;
        self.flush(if keep { Flush::Nothing } else { Flush::NonGlobalOf(self.pcid()) });
        Ok(())
    }

    pub fn mov_cr4<M: Memory>(&mut self, value: u64, memory: &M) -> Result<(), Refused> {
        let old = self.machine;
        let long = on(old.efer, 10);
        let changed = |bit| on(old.cr4 ^ value, bit);
        let illegal = value & !self.cr4_offered != 0
            || long && !on(value, 5)
            || long && changed(12)
            || on(value, 17) && changed(17) && (!long || old.cr3 & 0xfff != 0)
            || on(value, 23) && !on(old.cr0, 16);
        if illegal {
            return Err(Refused);
        }
        let pcid = self.pcid();
        let load = changed(4) || changed(5) || changed(7) || changed(20);
        self.commit(Machine { cr4: value, ..old }, load, memory)?;
        if changed(7) || changed(17) && !on(value, 17) {
            self.flush(Flush::Everything);
        }
        if changed(5) || changed(20) && on(value, 20) {
            self.flush(Flush::AllOf(pcid));
        }
        Ok(())
    }

    pub fn wrmsr_efer(&mut self, value: u64) -> Result<(), Refused> {
        let old = self.machine.efer;
        if value & !(self.efer_offered | 1 << 10) != 0 || on(old ^ value, 8) && on(self.machine.cr0, 31) {
            return Err(Refused);
        }
        self.machine.efer = value & !(1 << 10) | old & 1 << 10;
        Ok(())
    }

    /// A write by whoever runs the virtual machine: any registers, and nothing cached survives.
    pub fn host_write(&mut self, machine: Machine) {
        self.machine = machine;
        self.flush(Flush::Everything);
    }

    /// A far transfer: only 64-bit code is refused, outside long mode.
    pub fn far_jump(&mut self, long: bool) {
        self.cs_long = long && on(self.machine.efer, 10);
    }

    pub fn invlpg(&mut self, linear: u64) {
        let pcid = self.pcid();
        self.tlb.retain(|c| !(c.holds(linear) && (c.pcid == pcid || c.mapping.global)));
    }

    /// "INVPCID-Invalidate Process-Context Identifier".
    pub fn invpcid(&mut self, kind: u64, pcid: u64, linear: u64) -> Result<(), Refused> {
        if kind > 3 || pcid > 0xfff || kind < 2 && pcid != 0 && !on(self.machine.cr4, 17) {
            return Err(Refused);
        }
        match kind {
            0 => self.tlb.retain(|c| !(c.holds(linear) && c.pcid == pcid && !c.mapping.global)),
            1 => self.flush(Flush::NonGlobalOf(pcid)),
            2 => self.flush(Flush::Everything),
            _ => self.flush(Flush::NonGlobal),
        }
        Ok(())
    }

    /// The outcomes that entries of the TLB may give an access; the fresh walk's is always allowed too.
    pub fn stale(&self, linear: u64, attempt: Attempt) -> Vec<Result<u64, u32>> {
        if self.machine.form() == Form::Off {
            return Vec::new();
        }
        let pcid = self.pcid();
        let fits = |c: &&Cached| c.holds(linear) && (c.pcid == pcid || c.mapping.global && on(self.machine.cr4, 7));
        let outcome = |c: &Cached| match manual::denial(&self.machine, &c.mapping, attempt) {
            Some(code) => Err(code),
            None => Ok(c.mapping.frame + linear % (1 << c.mapping.shift)),
        };
        self.tlb.iter().filter(fits).map(outcome).collect()
    }

    /// After an access: what it used may stay, and a page fault takes what there was for its address.
    pub fn accessed(&mut self, linear: u64, verdict: &manual::Verdict) {
        match (verdict.outcome, verdict.mapping) {
            (Ok(_), Some(mapping)) => {
                if self.tlb.len() == TLB {
                    self.tlb.remove(0);
                }
                self.tlb.push(Cached { pcid: self.pcid(), linear: linear >> mapping.shift << mapping.shift, mapping });
            }
            (Ok(_), None) => {}
            (Err(_), _) => self.invlpg(linear),
        }
    }
}

impl Cached {
    fn holds(&self, linear: u64) -> bool {
        linear >> self.mapping.shift == self.linear >> self.mapping.shift
    }
}
