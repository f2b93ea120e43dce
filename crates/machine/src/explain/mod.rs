//! Says in words what a CPU's state means: reports for triple faults and for `umbra explain`.
//!
//! Everything here works on a [`Scene`], a state with the memory behind it, and changes nothing.

mod cause;
mod code;
mod fault;
mod paging;
mod registers;
mod tables;

pub use code::{Line, disassemble};
pub use fault::error_code;
pub use paging::{Denial, Level, Path, PathEnd, path};

use std::fmt::Write;
use umbra_arch::control::{ControlLimits, ControlRegs};
use umbra_arch::exit::{TripleFault, Unsupported};
use umbra_arch::fault::vector;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;
use umbra_arch::{CpuState, Fault, Gpa, Gva};
use umbra_memory::GuestMemory;

/// A control transfer: the block left and the address gone to, as offsets in CS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Branch {
    /// RIP of the block that was left.
    pub from: u64,
    /// RIP of the block that was entered.
    pub to: u64,
}

/// A processor's state with the memory behind it.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The state.
    pub state: &'a CpuState,
    /// Guest-physical memory.
    pub memory: &'a GuestMemory,
    /// CPUID facts that tables are read by.
    pub limits: ControlLimits,
    /// The last branches that are known, oldest first.
    pub branches: &'a [Branch],
}

impl Scene<'_> {
    /// The registers that govern paging.
    pub fn control_regs(&self) -> ControlRegs {
        let s = self.state;
        ControlRegs { cr0: s.cr0, cr3: s.cr3, cr4: s.cr4, efer: s.efer, pdpte: s.pdpte }
    }

    /// Linear address of `rip` in the code segment.
    pub fn linear(&self, rip: u64) -> u64 {
        if self.state.is_64bit_code() {
            return rip;
        }
        self.state.segment(Seg::Cs).base.wrapping_add(rip) & 0xffff_ffff
    }

    /// Linear address of the stack's top.
    pub fn stack(&self) -> u64 {
        let (rsp, ss) = (self.state.gpr[reg::RSP], self.state.segment(Seg::Ss));
        match (self.state.is_64bit_code(), ss.attr.is_big()) {
            (true, _) => rsp,
            (_, true) => ss.base.wrapping_add(rsp & 0xffff_ffff) & 0xffff_ffff,
            _ => ss.base.wrapping_add(rsp & 0xffff) & 0xffff_ffff,
        }
    }

    /// Physical address of a linear one, whatever the rights.
    pub fn physical(&self, gva: u64) -> Option<Gpa> {
        match paging::path(self, gva).end {
            PathEnd::Mapped(gpa) => Some(gpa),
            _ => None,
        }
    }

    /// Bytes at a linear address, as far as they are mapped.
    pub fn bytes(&self, gva: u64, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        for at in (0..len as u64).map(|n| gva.wrapping_add(n)) {
            let Some(gpa) = self.physical(at) else { break };
            let mut byte = [0];
            self.memory.read(gpa, &mut byte);
            out.push(byte[0]);
        }
        out
    }

    /// Eight bytes at a linear address.
    pub fn qword(&self, gva: u64) -> Option<u64> {
        let bytes = self.bytes(gva, 8);
        bytes.try_into().ok().map(u64::from_le_bytes)
    }
}

/// A finished explanation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// The report, for people.
    pub text: String,
    /// Likely causes in words, the likeliest first; may be empty.
    pub causes: Vec<String>,
}

/// Explains a triple fault.
pub fn triple_fault(scene: &Scene<'_>, triple: &TripleFault) -> Explanation {
    let mut out = String::new();
    let causes = cause::of_triple_fault(scene, triple);
    put(&mut out, "likely cause:");
    for cause in &causes {
        put(&mut out, &format!("  - {cause}"));
    }
    put(&mut out, "the chain:");
    chain(scene, triple, &mut out);
    instruction(scene, triple.at.1, &mut out);
    let mut vectors: Vec<u8> = origin(triple).into_iter().chain([triple.first.vector, vector::DF]).collect();
    vectors.dedup();
    for vector in vectors {
        out.push_str(&tables::gate(scene, vector));
    }
    out.push_str(&tables::task_state(scene));
    put(&mut out, "addresses:");
    for (name, gva, access) in addresses(scene, triple) {
        out.push_str(&paging::describe(scene, &name, gva, access));
    }
    branches(scene, &mut out);
    out.push_str(&registers::all(scene));
    Explanation { text: out, causes }
}

/// Explains an instruction that the engine refuses.
pub fn unsupported(scene: &Scene<'_>, what: &Unsupported) -> Explanation {
    let mut out = String::new();
    instruction(scene, what.rip, &mut out);
    let fetch = Access::explicit(AccessKind::Fetch, scene.state.cpl);
    out.push_str(&paging::describe(scene, "RIP", scene.linear(what.rip), fetch));
    branches(scene, &mut out);
    out.push_str(&registers::all(scene));
    Explanation { text: out, causes: Vec::new() }
}

/// Explains a state: registers bit by bit, and the walks of RIP, RSP, CR2 and `more` addresses.
pub fn state(scene: &Scene<'_>, more: &[u64]) -> Explanation {
    let mut out = registers::all(scene);
    instruction(scene, scene.state.rip, &mut out);
    out.push_str(&tables::task_state(scene));
    put(&mut out, "addresses:");
    let cpl = scene.state.cpl;
    let mut wanted = vec![
        ("RIP".to_owned(), scene.linear(scene.state.rip), Access::explicit(AccessKind::Fetch, cpl)),
        ("RSP".to_owned(), scene.stack().wrapping_sub(8), Access::explicit(AccessKind::Write, cpl)),
    ];
    if scene.state.cr2 != 0 {
        wanted.push(("CR2".to_owned(), scene.state.cr2, Access::explicit(AccessKind::Read, cpl)));
    }
    for &gva in more {
        wanted.push(("--address".to_owned(), gva, Access::explicit(AccessKind::Read, cpl)));
    }
    for (name, gva, access) in wanted {
        out.push_str(&paging::describe(scene, &name, gva, access));
    }
    for &gva in more {
        out.push_str(&paging::verdicts(scene, gva));
    }
    branches(scene, &mut out);
    Explanation { text: out, causes: Vec::new() }
}

fn put(out: &mut String, line: &str) {
    out.push_str(line);
    out.push('\n');
}

fn chain(scene: &Scene<'_>, triple: &TripleFault, out: &mut String) {
    let origin = origin(triple);
    let raised = match origin {
        None => "raised by the instruction".to_owned(),
        Some(event) => format!("while delivering {}", name_of(event)),
    };
    if let Some(event) = origin {
        let _ = writeln!(out, "  {:<6} {:<26} raised by the instruction, or an interrupt", "event", name_of(event));
    }
    let rows = [
        ("first", triple.first, raised),
        ("second", triple.second, format!("while delivering {}", triple.first.mnemonic())),
        ("third", triple.third, "while delivering the #DF that these two make".to_owned()),
    ];
    for (name, fault, when) in rows {
        // Writing to a String can't fail.
        let _ = writeln!(out, "  {name:<6} {:<26} {when}", fault.to_string());
        if let Some(words) = error_code(scene.state, &fault) {
            let _ = writeln!(out, "         {words}");
        }
    }
}

/// The event whose delivery raised the chain's first exception, as far as its error code tells.
fn origin(triple: &TripleFault) -> Option<u8> {
    let selector_like = matches!(triple.first.vector, vector::GP | vector::NP);
    triple.first.code.filter(|code| selector_like && code & 2 != 0).map(|code| (code >> 3) as u8)
}

fn name_of(vector: u8) -> String {
    let fault = Fault { vector, code: None, address: 0 };
    if fault.mnemonic() == "#??" { format!("vector {vector:#x}") } else { fault.mnemonic().to_owned() }
}

/// What each fault of the chain was about.
fn addresses(scene: &Scene<'_>, triple: &TripleFault) -> Vec<(String, u64, Access)> {
    let cpl = scene.state.cpl;
    let mut list =
        vec![("instruction".to_owned(), scene.linear(triple.at.1), Access::explicit(AccessKind::Fetch, cpl))];
    for vector in [triple.first.vector, vector::DF] {
        if list.iter().any(|(name, ..)| *name == format!("gate of vector {vector}")) {
            continue;
        }
        let Some(gate) = tables::gate_address(scene, vector) else { continue };
        list.push((format!("gate of vector {vector}"), gate, Access::implicit(AccessKind::Read)));
        if let Some(handler) = tables::handler(scene, vector) {
            list.push((format!("handler of vector {vector}"), handler, Access::explicit(AccessKind::Fetch, 0)));
        }
        if let Some(stack) = tables::delivery_stack(scene, vector) {
            let top = stack.wrapping_sub(8);
            list.push((format!("stack for vector {vector}"), top, Access::implicit(AccessKind::Write)));
        }
    }
    for fault in page_faults(triple) {
        let access = fault::access_of(fault.code.unwrap_or(0));
        list.push((format!("{} at", fault.mnemonic()), fault.address, access));
    }
    let mut seen = Vec::new();
    list.retain(|(_, gva, access)| {
        let new = !seen.contains(&(*gva, *access));
        seen.push((*gva, *access));
        new
    });
    list
}

fn page_faults(triple: &TripleFault) -> impl Iterator<Item = Fault> {
    [triple.first, triple.second, triple.third].into_iter().filter(|fault| fault.vector == vector::PF)
}

fn instruction(scene: &Scene<'_>, rip: u64, out: &mut String) {
    let _ = match disassemble(scene, rip) {
        Some(line) => writeln!(out, "instruction: {line}"),
        None => writeln!(out, "instruction: the bytes at {:#x} can't be read", scene.linear(rip)),
    };
}

fn branches(scene: &Scene<'_>, out: &mut String) {
    if scene.branches.is_empty() {
        return;
    }
    put(out, "last branches recorded (others, as in translated code, may be missing: --trace insn), oldest first:");
    for branch in scene.branches {
        let _ = writeln!(out, "  {:#x} -> {:#x}", branch.from, branch.to);
    }
}

/// Whether `gva` can be an address in the mode in force.
fn is_canonical(scene: &Scene<'_>, gva: u64) -> bool {
    !scene.state.efer.lma() || Gva::new(gva).is_canonical(scene.state.linear_bits())
}
