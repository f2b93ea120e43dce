//! How a run ended, for people and for programs. All of it goes to stderr.

use super::Guest;
use super::measure::PhaseReport;
use crate::error::CliError;
use crate::exit_code;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::time::Duration;
use umbra_accel::defects::{self, Defect};
use umbra_accel::kvm::Irqchip;
use umbra_arch::CpuState;
use umbra_arch::exit::TripleFault;
use umbra_arch::segment::Seg;
use umbra_jit::JitStats;
use umbra_machine::boot::ImageKind;
use umbra_machine::explain::Explanation;
use umbra_machine::{End, PageStats, Stop};
use umbra_mmu::MmuStats;

/// Everything about a finished run.
pub struct Report {
    pub end: End,
    pub exit_code: u8,
    /// The guest checks itself and its report doesn't say that all is well.
    pub verdict_missing: bool,
    pub kind: Option<ImageKind>,
    pub state: Option<CpuState>,
    /// Comparisons made in lockstep.
    pub turns: Option<u64>,
    /// What differs in lockstep.
    pub difference: Option<String>,
    /// Why, where that can be said.
    pub explanation: Option<Explanation>,
    /// Virtual time at the end, in nanoseconds.
    pub guest_ns: u64,
    /// Instructions retired.
    pub retired: u64,
    /// Bytes of guest memory in pages that were ever written.
    pub written_bytes: u64,
    /// Host time from start to end.
    pub host: Duration,
    pub mmu: Option<MmuStats>,
    /// Of RAM that arrives on demand, if any does.
    pub pages: Option<PageStats>,
    /// Of the translator, if it ran.
    pub jit: Option<JitStats>,
    pub phases: Vec<PhaseReport>,
    /// Print counters.
    pub stats: bool,
    /// What the accelerator did, if there is one.
    pub acceleration: Option<Acceleration>,
}

/// An accelerator's part in a run.
pub struct Acceleration {
    /// The backend's label, which belongs to every result.
    pub backend: &'static str,
    /// Where the local APIC was.
    pub irqchip: Irqchip,
    /// Why it wasn't KVM's own, where it might have been.
    pub irqchip_defect: Option<&'static Defect>,
    /// CPU features that it can't offer.
    pub dropped: Vec<String>,
    /// Changes of engines, in words.
    pub switches: Vec<String>,
    /// Whether it still had the guest at the end.
    pub to_the_end: bool,
}

impl Acceleration {
    /// The part that it had in this guest's run.
    pub fn of(guest: &Guest) -> Option<Self> {
        let engine = guest.machine.vcpu(0)?;
        let (backend, irqchip) = engine.backend()?;
        Some(Self {
            backend: backend.label(),
            irqchip,
            irqchip_defect: defects::of_split_irqchip(backend).filter(|_| irqchip == Irqchip::User),
            dropped: guest.dropped.clone(),
            switches: engine.switches(),
            to_the_end: engine.is_accelerated(),
        })
    }
}

/// Tells people or programs that nothing was run.
pub fn print_error(error: &CliError, json: bool) {
    if json {
        eprintln!("{}", json!({ "end": "error", "exit_code": exit_code::HOST, "message": error.to_string() }));
    } else {
        eprintln!("umbra: {error}");
    }
}

impl Report {
    /// Prints to stderr.
    pub fn print(&self, json: bool) {
        if json {
            eprintln!("{}", self.json());
        } else {
            eprint!("{}", self.text());
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String can't fail.
        if let Some(part) = &self.acceleration {
            let _ = writeln!(out, "umbra: executed by {}, irqchip: {}", part.backend, part.irqchip);
            if let Some(defect) = part.irqchip_defect {
                let _ = writeln!(out, "umbra: KVM's own local APIC isn't used: {}: {}", defect.name, defect.what);
            }
            if !part.dropped.is_empty() {
                let _ = writeln!(out, "umbra: CPU features that it can't offer: {}", part.dropped.join(", "));
            }
            for switch in &part.switches {
                let _ = writeln!(out, "umbra: handed over {switch}");
            }
        }
        let _ = writeln!(out, "umbra: {}", sentence(&self.end));
        if matches!(self.end, End::Refused(_)) {
            let _ = writeln!(out, "umbra: --handover-at refusal goes on in Umbra's own engine");
        }
        if self.verdict_missing {
            let _ = writeln!(out, "umbra: the embedded guest's report does not say that all is well");
        }
        if self.exit_code == exit_code::NOT_SEEN && !self.verdict_missing {
            let _ = writeln!(out, "umbra: the string of --expect did not appear");
        }
        if let (Some(turns), None) = (self.turns, &self.difference) {
            let _ = writeln!(out, "umbra: compared {turns} times, and no difference");
        }
        if let Some(difference) = &self.difference {
            out.push_str(difference);
        } else if let Some(explanation) = &self.explanation {
            out.push_str(&explanation.text);
        } else if let Some(state) = self.state.as_ref().filter(|_| self.shows_registers()) {
            out.push_str(&registers(state));
        }
        if self.stats {
            self.statistics(&mut out);
        }
        out
    }

    /// Where a guest that didn't end by itself was. After a timeout only for those who ask for figures.
    fn shows_registers(&self) -> bool {
        match self.end {
            End::TripleFault(_) | End::HaltedForever(_) | End::Unsupported(_) => true,
            End::ShutdownUnseen(_) | End::Refused(_) => true,
            End::Stopped(Stop::Timeout) => self.stats,
            _ => false,
        }
    }

    fn statistics(&self, out: &mut String) {
        let seconds = self.host.as_secs_f64();
        let rate = self.retired as f64 / seconds.max(1e-9) / 1e6;
        let _ = writeln!(out, "guest time                {:>16} ns", self.guest_ns);
        let _ = writeln!(out, "instructions retired      {:>16}", self.retired);
        let _ = writeln!(out, "guest memory written      {:>16} bytes", self.written_bytes);
        let _ = writeln!(out, "host time                 {seconds:>16.3} s ({rate:.1} million instructions a second)");
        if let Some(mmu) = &self.mmu {
            let _ = write!(out, "{mmu}");
        }
        if let Some(PageStats { loaded, swapped, events, waits }) = self.pages {
            let _ = writeln!(out, "pages loaded              {loaded:>16}");
            let _ = writeln!(out, "pages sent away           {swapped:>16}");
            let _ = writeln!(out, "asynchronous page faults  {events:>16}");
            let _ = writeln!(out, "waits for pages           {waits:>16}");
        }
        if let Some(jit) = &self.jit {
            let _ = write!(out, "{jit}");
        }
        for phase in &self.phases {
            let _ = writeln!(out, "{} ({}):", phase.name, phase.count);
            for (name, value) in &phase.counters {
                let each = *value as f64 / f64::from(phase.count.max(1));
                let _ = writeln!(out, "    {:<22}{value:>16} ({each:.3} each)", name.replace('_', " "));
            }
        }
    }

    fn json(&self) -> Value {
        let counters =
            |fields: Vec<(String, u64)>| Value::Object(fields.into_iter().map(|(k, v)| (k, v.into())).collect());
        let mut object = Map::new();
        object.insert("end".into(), name(&self.end).into());
        object.insert("exit_code".into(), self.exit_code.into());
        object.insert("message".into(), sentence(&self.end).into());
        object.insert("image".into(), self.kind.map(|kind| format!("{kind:?}")).into());
        detail(&self.end, &mut object);
        object.insert("guest_ns".into(), self.guest_ns.into());
        object.insert("retired".into(), self.retired.into());
        object.insert("written_bytes".into(), self.written_bytes.into());
        object.insert("host_seconds".into(), self.host.as_secs_f64().into());
        if let Some(turns) = self.turns {
            object.insert("compared".into(), turns.into());
        }
        if let Some(difference) = &self.difference {
            object.insert("difference".into(), difference.clone().into());
        }
        if let Some(explanation) = &self.explanation {
            object.insert("causes".into(), explanation.causes.clone().into());
            object.insert("explanation".into(), explanation.text.clone().into());
        }
        if let Some(part) = &self.acceleration {
            let part = json!({
                "backend": part.backend,
                "irqchip": part.irqchip.to_string(),
                "irqchip_defect": part.irqchip_defect.map(|defect| defect.name),
                "dropped_features": part.dropped,
                "hand_overs": part.switches,
                "to_the_end": part.to_the_end,
            });
            object.insert("acceleration".into(), part);
        }
        if self.verdict_missing {
            object.insert("verdict".into(), "missing".into());
        }
        if let Some(mmu) = &self.mmu {
            object.insert("mmu".into(), counters(mmu.fields().collect()));
        }
        if let Some(PageStats { loaded, swapped, events, waits }) = self.pages {
            object.insert(
                "pages".into(),
                json!({ "loaded": loaded, "swapped": swapped, "events": events, "waits": waits }),
            );
        }
        if let Some(jit) = &self.jit {
            object.insert("jit".into(), counters(jit.fields().map(|(name, value)| (name.into(), value)).to_vec()));
        }
        if !self.phases.is_empty() {
            let phases = self.phases.iter().map(
                |phase| json!({ "name": phase.name, "count": phase.count, "counters": counters(phase.counters.clone()) }),
            );
            object.insert("phases".into(), phases.collect::<Vec<_>>().into());
        }
        Value::Object(object)
    }
}

/// A name that programs can compare with.
fn name(end: &End) -> &'static str {
    match end {
        End::PowerOff => "power-off",
        End::Reset => "reset",
        End::DebugExit(_) => "debug-exit",
        End::Expected => "expected",
        End::HaltedForever(_) => "halted",
        End::TripleFault(_) => "triple-fault",
        End::ShutdownUnseen(_) => "shutdown",
        End::Unsupported(_) => "unsupported",
        End::Refused(_) => "refused",
        End::MemoryFile(_) => "memory-file",
        End::Limit => "limit",
        End::Mark(_) => "mark",
        End::Stopped(Stop::Timeout) => "timeout",
        End::Stopped(Stop::User) => "user",
        End::Stopped(Stop::Signal(_)) => "signal",
        End::Stopped(Stop::OutputClosed) => "output-closed",
        End::Stopped(Stop::HandOver) => "hand-over",
        End::Stopped(Stop::Difference) => "difference",
    }
}

/// How a run ended, in words.
pub fn sentence(end: &End) -> String {
    match end {
        End::PowerOff => "the guest powered off".into(),
        End::Reset => "the guest asked for a reboot".into(),
        End::DebugExit(value) => format!("the guest wrote {value:#x} to the debug-exit port"),
        End::Expected => "the expected string appeared".into(),
        End::HaltedForever(halted) if halted.interrupts_enabled => {
            format!("halted for ever: HLT before {:#x}, and no device has an interrupt to send", halted.rip)
        }
        End::HaltedForever(halted) => format!("halted for ever: HLT with interrupts off before {:#x}", halted.rip),
        End::TripleFault(fault) => triple_fault(fault),
        End::Unsupported(what) => format!("not implemented: {} at {:#x}", what.what, what.rip),
        End::ShutdownUnseen(rip) => format!("triple fault under the accelerator, which doesn't say why, at {rip:#x}"),
        End::Refused(refusal) => format!("the accelerator can't go on: {refusal}"),
        End::MemoryFile(failure) => failure.to_string(),
        End::Limit => "the virtual time limit was reached".into(),
        End::Mark(id) => format!("measurement mark {id}"),
        End::Stopped(Stop::Timeout) => "timeout".into(),
        End::Stopped(Stop::User) => "left by Ctrl-A x".into(),
        End::Stopped(Stop::Signal(signal)) => format!("ended by signal {signal}"),
        End::Stopped(Stop::OutputClosed) => "stdout can't be written any more".into(),
        End::Stopped(Stop::HandOver) => "another engine is to take over".into(),
        End::Stopped(Stop::Difference) => "the interpreter and the translator differ".into(),
    }
}

fn triple_fault(fault: &TripleFault) -> String {
    let (base, rip) = fault.at;
    format!(
        "triple fault: {} at {:#x} (CS base {base:#x}), then {}, then {} while delivering the double fault",
        fault.first, rip, fault.second, fault.third
    )
}

fn detail(end: &End, object: &mut Map<String, Value>) {
    match end {
        End::DebugExit(value) => {
            object.insert("debug_exit".into(), (*value).into());
        }
        End::HaltedForever(halted) => {
            object.insert("rip".into(), halted.rip.into());
            object.insert("interrupts_enabled".into(), halted.interrupts_enabled.into());
        }
        End::TripleFault(fault) => {
            let chain = [fault.first, fault.second, fault.third].map(|fault| fault.to_string());
            object.insert("rip".into(), fault.at.1.into());
            object.insert("faults".into(), chain.to_vec().into());
        }
        End::Unsupported(what) => {
            object.insert("rip".into(), what.rip.into());
            object.insert("unsupported".into(), what.what.clone().into());
        }
        End::ShutdownUnseen(rip) => {
            object.insert("rip".into(), (*rip).into());
        }
        End::Refused(refusal) => {
            object.insert("rip".into(), refusal.rip.into());
            object.insert("refused".into(), format!("{}: {}", refusal.kind.name(), refusal.detail).into());
            object.insert("bytes".into(), refusal.bytes.clone().into());
        }
        End::Stopped(Stop::Signal(signal)) => {
            object.insert("signal".into(), (*signal).into());
        }
        _ => {}
    }
}

/// The registers one needs to start looking for the cause.
pub fn registers(state: &CpuState) -> String {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let mut out = String::new();
    for (index, (name, value)) in NAMES.iter().zip(state.gpr).enumerate() {
        let _ = write!(out, "{name:>4} {value:016x}{}", if index % 4 == 3 { "\n" } else { " " });
    }
    let cs = state.segment(Seg::Cs);
    let _ = writeln!(
        out,
        " rip {:016x}  cs {:04x} base {:x}  rflags {:x}  cpl {}",
        state.rip, cs.selector, cs.base, state.rflags, state.cpl
    );
    let (cr0, cr3, cr4, efer) = (state.cr0.raw(), state.cr3.raw(), state.cr4.raw(), state.efer.raw());
    let _ = writeln!(out, " cr0 {cr0:x}  cr2 {:x}  cr3 {cr3:x}  cr4 {cr4:x}  efer {efer:x}", state.cr2);
    out
}
