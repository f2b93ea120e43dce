//! `--lockstep`: the same guest on the interpreter and on the translator, in two machines that take turns and are
//! compared after each.

use super::args::{Args, EngineChoice, JitArgs};
use super::engine::Pace;
use super::guest::{self, Guest};
use crate::error::CliError;
use serde_json::Value;
use std::cmp::Ordering;
use std::fmt::Write;
use umbra_arch::{CpuState, PAGE_SIZE, Vcpu, VirtualTime};
use umbra_cpu::Interpreter;
use umbra_machine::explain::{Scene, disassemble};
use umbra_machine::{End, Host, Stop};
use umbra_memory::{GuestMemory, PageFlags};

/// Turns from one comparison of memory to the next.
const MEMORY_EVERY: u64 = 1 << 22;
/// Instructions shown of a block that did different things.
const SHOWN: usize = 64;

/// A guest twice.
pub struct Lockstep {
    reference: Guest,
    translated: Guest,
    /// Blocks in a turn.
    blocks: u64,
    turns: u64,
    /// The reference's CPUs before the turn.
    before: Vec<CpuState>,
}

/// How far lockstep came.
pub enum Course {
    /// To the guest's end.
    Same(End),
    /// Not so far: what differs, in words.
    Different(String),
}

/// Lets a machine have one turn of its run loop.
struct Turn<'a> {
    /// Where the guest's output goes, if it isn't only compared.
    host: Option<&'a mut dyn Host>,
    sent: Vec<u8>,
    is_over: bool,
}

impl<'a> Turn<'a> {
    fn new(host: Option<&'a mut dyn Host>) -> Self {
        Self { host, sent: Vec::new(), is_over: false }
    }
}

impl Host for Turn<'_> {
    fn serial(&mut self, bytes: &[u8]) {
        self.sent.extend(bytes);
        if let Some(host) = &mut self.host {
            host.serial(bytes);
        }
    }

    fn debug(&mut self, bytes: &[u8]) {
        self.sent.extend(bytes);
        if let Some(host) = &mut self.host {
            host.debug(bytes);
        }
    }

    fn stop(&mut self) -> Option<Stop> {
        if std::mem::replace(&mut self.is_over, true) {
            return Some(Stop::HandOver);
        }
        self.host.as_mut().and_then(|host| host.stop())
    }
}

/// Whether a machine that stopped for this reason goes on.
fn goes_on(end: &End) -> bool {
    matches!(end, End::Stopped(Stop::HandOver) | End::Mark(_))
}

/// Whether somebody outside has stopped it, at any place.
fn was_stopped(end: &End) -> bool {
    !goes_on(end) && matches!(end, End::Stopped(_))
}

/// One turn of a machine's run loop.
fn turn(guest: &mut Guest, host: &mut Turn<'_>, pace: Pace) -> End {
    guest.machine.vcpus_mut().for_each(|engine| engine.set_pace(pace));
    host.is_over = false;
    guest.machine.run(host, None)
}

/// Virtual time of the one CPU.
fn clock(guest: &Guest) -> VirtualTime {
    guest.machine.vcpu(0).map_or(VirtualTime(0), |engine| engine.soft().core().clock)
}

impl Lockstep {
    /// Both machines, for turns of `blocks` blocks.
    ///
    /// # Errors
    /// [`CliError`] names the argument that has to change.
    pub fn new(args: &Args, blocks: u64) -> Result<Self, CliError> {
        if args.smp > 1 {
            return Err(CliError::LockstepCpus);
        }
        let translated = guest::build(args)?;
        let reference = Args { engine: Some(EngineChoice::Interp), jit: JitArgs::default(), ..args.clone() };
        Ok(Self::of(guest::build(&reference)?, translated, blocks))
    }

    fn of(reference: Guest, translated: Guest, blocks: u64) -> Self {
        let before = reference.machine.vcpus().map(Vcpu::state).collect();
        Self { reference, translated, blocks, turns: 0, before }
    }

    /// Runs both to the guest's end or the first difference.
    pub fn run(&mut self, host: &mut dyn Host) -> Course {
        let blocks = self.blocks;
        loop {
            let mut first = Turn::new(Some(&mut *host));
            let mut end = turn(&mut self.reference, &mut first, Pace::Blocks(blocks));
            if was_stopped(&end) {
                return Course::Same(end);
            }
            // Several blocks are a stretch of time to the translator, so that it leaves its code as seldom as ever.
            let pace = if blocks > 1 { Pace::Until(clock(&self.reference)) } else { Pace::Blocks(1) };
            let mut second = Turn::new(None);
            let mut other = turn(&mut self.translated, &mut second, pace);
            self.turns += 1;
            (end, other) = self.catch_up((&mut first, &mut second), (end, other));
            if was_stopped(&end) {
                // On its way to where the translator is.
                return Course::Same(end);
            }
            let sent = (first.sent, second.sent);
            if let Some(what) = self.compare((&end, &other), (&sent.0, &sent.1)) {
                return Course::Different(self.report(&what));
            }
            if !goes_on(&end) {
                return Course::Same(end);
            }
        }
    }

    /// Lets the machine that is behind run to where the other one is: the translator goes on to a trace's end, and a block
    /// may end after a store to what only one of them has decoded.
    fn catch_up(
        &mut self,
        (first, second): (&mut Turn<'_>, &mut Turn<'_>),
        (mut end, mut other): (End, End),
    ) -> (End, End) {
        loop {
            let (ours, theirs) = (clock(&self.reference), clock(&self.translated));
            let moved = match ours.cmp(&theirs) {
                // The other one may have come to the guest's end.
                Ordering::Less if goes_on(&end) => {
                    end = turn(&mut self.reference, first, Pace::Until(theirs));
                    clock(&self.reference) > ours
                }
                Ordering::Greater if goes_on(&other) => {
                    other = turn(&mut self.translated, second, Pace::Until(ours));
                    clock(&self.translated) > theirs
                }
                _ => break,
            };
            if !moved {
                break;
            }
        }
        (end, other)
    }

    /// What differs after a turn, if anything does.
    fn compare(&mut self, ends: (&End, &End), sent: (&[u8], &[u8])) -> Option<String> {
        if let Some(what) = self.difference() {
            return Some(what);
        }
        if sent.0 != sent.1 {
            return Some(format!("output: {:?} and {:?}\n", text(sent.0), text(sent.1)));
        }
        if ends.0 != ends.1 && !(goes_on(ends.0) && goes_on(ends.1)) {
            let sentence = super::report::sentence;
            return Some(format!("end: {}; {}\n", sentence(ends.0), sentence(ends.1)));
        }
        if self.turns.is_multiple_of(MEMORY_EVERY) || !goes_on(ends.0) { self.memory() } else { None }
    }

    /// Comparisons made.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// The guest as the translator left it.
    pub fn into_guest(self) -> Guest {
        self.translated
    }

    /// What differs in the CPUs; remembers their states otherwise.
    fn difference(&mut self) -> Option<String> {
        let pairs = self.reference.machine.vcpus().zip(self.translated.machine.vcpus());
        for (index, (reference, translated)) in pairs.enumerate() {
            let (ours, theirs) = (reference.state(), translated.state());
            let counts = [counts(reference.soft()), counts(translated.soft())];
            if ours != theirs || counts[0] != counts[1] {
                return Some(format!("CPU {index}, interpreter and translator:\n{}", fields(&ours, &theirs, counts)));
            }
            self.before[index] = ours;
        }
        None
    }

    /// The first byte of memory that differs.
    fn memory(&self) -> Option<String> {
        let [ours, theirs] = [&self.reference, &self.translated].map(|guest| guest.machine.memory());
        let mut pages: Vec<_> = ours.pages_with(PageFlags::DIRTY).chain(theirs.pages_with(PageFlags::DIRTY)).collect();
        pages.sort_unstable();
        pages.dedup();
        let mut bytes = [[0; PAGE_SIZE as usize]; 2];
        for page in pages {
            for (memory, bytes) in [ours, theirs].into_iter().zip(&mut bytes) {
                memory.load_bytes(page, bytes);
            }
            if let Some(at) = bytes[0].iter().zip(&bytes[1]).position(|(a, b)| a != b) {
                let values = (bytes[0][at], bytes[1][at]);
                return Some(format!(
                    "memory at RAM offset {:#x}: {:#x} and {:#x}, written in the last {MEMORY_EVERY} turns\n",
                    page.raw() + at as u64,
                    values.0,
                    values.1
                ));
            }
        }
        None
    }

    /// A difference, and the blocks since the states were the same.
    fn report(&self, what: &str) -> String {
        let mut out = format!("the engines differ after turn {} ({} blocks each)\n{what}", self.turns, self.blocks);
        for (index, (state, engine)) in self.before.iter().zip(self.translated.machine.vcpus()).enumerate() {
            let core = engine.soft().core();
            let memory: &GuestMemory = self.reference.machine.memory();
            let scene = Scene { state, memory, limits: core.limits, branches: &[] };
            // Writing to a String can't fail.
            let _ = writeln!(out, "CPU {index} before it:\n{}", super::report::registers(state).trim_end());
            let mut rip = state.rip;
            for _ in 0..SHOWN {
                let Some(line) = disassemble(&scene, rip) else { break };
                rip = rip.wrapping_add(line.bytes.len() as u64);
                let _ = writeln!(out, "  {line}");
                if rip >> 12 != state.rip >> 12 || ends_block(&line.text) {
                    break;
                }
            }
            let translations = engine.translator().map(|jit| jit.translations_at(state.rip)).unwrap_or_default();
            translations.iter().for_each(|translated| out.push_str(&translated.to_string()));
        }
        out
    }
}

/// Roughly: what comes behind it isn't of interest.
fn ends_block(text: &str) -> bool {
    text.starts_with('j') || ["call", "ret", "iret", "sys", "hlt", "("].iter().any(|start| text.starts_with(start))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Instructions retired and virtual time.
fn counts(engine: &Interpreter) -> (u64, VirtualTime) {
    (engine.retired(), engine.core().clock)
}

/// The fields that differ, by name.
fn fields(ours: &CpuState, theirs: &CpuState, counts: [(u64, VirtualTime); 2]) -> String {
    let mut out = String::new();
    // A state is plain data: it can't fail to be written.
    let values = [ours, theirs].map(|state| serde_json::to_value(state).unwrap_or_default());
    list("", &values[0], &values[1], &mut out);
    let numbers = [("instructions", counts[0].0, counts[1].0), ("virtual time", counts[0].1.0, counts[1].1.0)];
    for (name, first, second) in numbers.into_iter().filter(|(_, first, second)| first != second) {
        let _ = writeln!(out, "  {name:<14}{first:>20} {second:>20}");
    }
    out
}

fn list(name: &str, ours: &Value, theirs: &Value, out: &mut String) {
    match (ours, theirs) {
        _ if ours == theirs => {}
        (Value::Object(first), Value::Object(second)) => {
            for (key, value) in first {
                list(&format!("{name}.{key}"), value, &second[key], out);
            }
        }
        (Value::Array(first), Value::Array(second)) => {
            for (index, (first, second)) in first.iter().zip(second).enumerate() {
                list(&format!("{name}[{index}]"), first, second, out);
            }
        }
        _ => {
            let number = |value: &Value| value.as_u64().map_or_else(|| value.to_string(), |n| format!("{n:#x}"));
            let _ = writeln!(out, "  {:<14}{:>20} {:>20}", name.trim_start_matches('.'), number(ours), number(theirs));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
    use umbra_arch::segment::{Attr, Seg, Segment};

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    /// Hears nothing.
    struct Deaf;

    impl Host for Deaf {
        fn serial(&mut self, _: &[u8]) {}
    }

    fn both(blocks: &str) -> Lockstep {
        let command = Command::parse_from(["umbra", "--engine", "jit", "--lockstep", blocks]);
        Lockstep::new(&command.args, command.args.jit.lockstep.unwrap()).unwrap()
    }

    #[track_caller]
    fn differs(mut both: Lockstep, parts: &[&str]) {
        let Course::Different(report) = both.run(&mut Deaf) else { panic!("no difference") };
        for part in parts {
            assert!(report.contains(part), "no {part:?} in {report}");
        }
    }

    #[test]
    fn another_register_is_told_with_the_block_that_made_it() {
        for blocks in ["1", "10"] {
            let mut both = both(blocks);
            let engine = both.translated.machine.vcpus_mut().next().unwrap();
            let mut state = engine.state();
            state.gpr[5] = 0x77;
            engine.set_state(&state);
            differs(both, &["gpr[5]", "0x77", "CPU 0 before it", "rip 000000000000fff0", "0xfff0: "]);
        }
    }

    #[test]
    fn the_report_has_the_host_code() {
        let mut both = both("1");
        for _ in 0..200_000 {
            let mut first = Turn::new(None);
            let mut second = Turn::new(None);
            let end = turn(&mut both.reference, &mut first, Pace::Blocks(1));
            let other = turn(&mut both.translated, &mut second, Pace::Blocks(1));
            both.catch_up((&mut first, &mut second), (end, other));
        }
        assert_eq!(both.difference(), None);
        let engine = both.translated.machine.vcpus_mut().next().unwrap();
        let mut state = engine.state();
        state.gpr[5] ^= 0x77;
        engine.set_state(&state);
        differs(both, &["gpr[5]", "-bit", "of host code", "sub qword ptr [r15+budget"]);
    }

    #[test]
    fn another_byte_of_memory_is_told_at_the_end() {
        let both = both("50");
        both.translated.machine.memory().write(umbra_arch::Gpa::new(0x7_7777), &[9]);
        differs(both, &["memory at RAM offset 0x77777: 0x0 and 0x9"]);
    }

    /// Has a machine run 64-bit code from 0x9000 on, identity-mapped.
    fn begin_at_code(guest: &mut Guest, code: &[u8]) {
        let put = |at: u64, bytes: &[u8]| guest.machine.memory().write(umbra_arch::Gpa::new(at), bytes);
        for (at, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
            put(at, &entry.to_le_bytes());
        }
        put(0x9000, code);
        let engine = guest.machine.vcpus_mut().next().unwrap();
        let mut s = engine.state();
        s.cr0 = Cr0::new(0x8000_0011);
        s.cr3 = Cr3::new(0x1000);
        s.cr4 = Cr4::new(0x20);
        s.efer = Efer::new(0x500);
        s.seg[Seg::Cs as usize] = Segment { selector: 8, base: 0, limit: u32::MAX, attr: Attr(0xa09b) };
        s.rip = 0x9000;
        engine.set_state(&s);
    }

    /// Stops the run when it has been asked so often.
    struct Impatient(u32);

    impl Host for Impatient {
        fn serial(&mut self, _: &[u8]) {}

        fn stop(&mut self) -> Option<Stop> {
            self.0 = self.0.saturating_sub(1);
            (self.0 == 0).then_some(Stop::Timeout)
        }
    }

    #[test]
    fn a_stop_on_the_way_to_a_traces_end_is_no_difference() {
        // mov ecx, 900; test ecx, 1; jz to dec; nop; dec ecx; jnz to test; jmp to mov
        let code = [0xb9, 132, 3, 0, 0, 0xf7, 0xc1, 1, 0, 0, 0, 0x74, 1, 0x90, 0xff, 0xc9, 0x75, 0xf3, 0xeb, 0xec];
        for asks in 40..100 {
            let mut both = both("1");
            begin_at_code(&mut both.reference, &code);
            begin_at_code(&mut both.translated, &code);
            match both.run(&mut Impatient(asks)) {
                Course::Same(end) => assert!(was_stopped(&end)),
                Course::Different(report) => panic!("stopped at {asks}: {report}"),
            }
        }
    }

    #[test]
    fn the_end_may_come_in_a_trace() {
        // mov ecx, 40; mov ebx, 0xf4, the debug-exit port; mov edx, 0x80; cmp ecx, 1; cmove edx, ebx
        let mut code =
            vec![0xb9, 40, 0, 0, 0, 0xbb, 0xf4, 0, 0, 0, 0xba, 0x80, 0, 0, 0, 0x83, 0xf9, 1, 0x0f, 0x44, 0xd3];
        // cmp ecx, 0; je to hlt; mov eax, esi; out dx, ax; dec ecx; jmp to mov edx; hlt
        code.extend([0x83, 0xf9, 0, 0x74, 8, 0x89, 0xf0, 0x66, 0xef, 0xff, 0xc9, 0xeb, 0xe8, 0xf4]);
        let mut both = both("1");
        begin_at_code(&mut both.reference, &code);
        begin_at_code(&mut both.translated, &code);
        let Course::Same(end) = both.run(&mut Deaf) else { panic!("they differ") };
        assert!(!goes_on(&end), "{end:?}");
        let translator = both.translated.machine.vcpu(0).and_then(|engine| engine.translator());
        assert!(translator.is_some_and(|jit| jit.stats().ops_translated > 20));
    }
}
