//! What privileged operations cost: one loop for each, to be timed by the host at the lines it prints.
//!
//! After each loop a line `@@U NAME ITERATIONS` goes to COM1. `bench/mmu.py` runs this ROM under Umbra and
//! another emulator and prints ratios.

mod kernexec;
mod loops;

use crate::Rom;
use crate::embedded::switches;
use crate::link::{Code, Linker};
use crate::pc::selector;
use crate::report::{check, print, section};
use crate::stages::{Done, Stages, build, nothing};
use iced_x86::code_asm::*;

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "costs",
    about: "what switches of CR0, CR3, CR4, EFER and mode, page-table edits and #PF cost; timed by bench/mmu.py",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra costs", real: nothing, protected: loops::prepare, long, data };

fn long(c: &mut Code<'_>) -> Done {
    section(c, "costs", |c| {
        loops::enter(c)?;
        print(c, "@@U start 0\n")?;
        loops::all(c)?;
        kernexec::all(c)?;
        c.xor(eax, eax)?;
        check(c, eax, 0)
    })
}

fn data(l: &mut Linker) -> Done {
    l.code(64, switches::trip_return)?;
    l.code(32, switches::trips32)?;
    for name in ["trip pae", "trip 2-level"] {
        let mut bytes = l.address(name).to_le_bytes().to_vec();
        bytes.extend_from_slice(&selector::CODE32.to_le_bytes());
        l.data(&format!("far {name}"), &bytes)?;
    }
    Ok(())
}

/// `count` times `body`, which leaves R13 alone, then the line that says so.
fn timed(c: &mut Code<'_>, name: &str, count: u32, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    let mut next = c.create_label();
    c.mov(r13d, count)?;
    c.set_label(&mut next)?;
    body(c)?;
    c.dec(r13d)?;
    c.jne(next)?;
    print(c, &format!("@@U {name} {count}\n"))
}
