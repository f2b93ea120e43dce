//! The engine `host`: the host CPU itself, one ring-3 instruction at a time.

use crate::case::{Case, Layout, Piece, Run};
use crate::engine::{Answer, End, Engine, Outcome};
use crate::rows;
use crate::window::{BYTES, PHYSICAL, background};
use std::ops::Range;
use umbra_arch::Fault;
use umbra_hostexec::native::{Ended, Mode, NativeCpu, NativeError, NativeState, Until};

/// The host CPU.
pub struct Host {
    cpu: NativeCpu,
}

impl Host {
    /// Takes the process's fault signals.
    ///
    /// # Errors
    /// [`NativeError`].
    pub fn new() -> Result<Self, NativeError> {
        let mut cpu = NativeCpu::new()?;
        cpu.write(0, background());
        Ok(Self { cpu })
    }

    fn execute(&mut self, case: &Case, mode: Mode, until: Until) -> Answer {
        let i = rows::instruction(case, mode);
        let s = &case.state;
        let mut native = NativeState { gpr: s.gpr, rip: s.rip, rflags: s.rflags, selectors: [0; 6], fp: s.fp };
        let end = match self.cpu.run(&i, mode, until, &mut native, rows::uses_fp(i.code())) {
            Ended::Done => End::Completed,
            Ended::Fault(f) => End::Fault(Fault { vector: f.vector, code: Some(f.code), address: f.address }),
            Ended::Refused(why) => return Answer::cannot(why),
        };
        let mut state = Box::new(case.state.clone());
        (state.gpr, state.rip, state.rflags, state.fp) = (native.gpr, native.rip, native.rflags, native.fp);
        for (segment, selector) in state.seg.iter_mut().zip(native.selectors) {
            segment.selector = selector;
        }
        let read = |range: &std::ops::Range<u64>| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.cpu.read((range.start - PHYSICAL) as usize, &mut bytes);
            Piece { gpa: range.start, bytes }
        };
        Answer::Outcome(Outcome { end, state: Some(state), memory: case.watch.iter().map(read).collect() })
    }

    /// Puts back what the case may have changed.
    fn restore(&mut self, case: &Case) {
        for range in case.ranges() {
            let offset = (range.start - PHYSICAL) as usize;
            self.cpu.write(offset, &background()[offset..(range.end - PHYSICAL) as usize]);
        }
    }
}

impl Engine for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    fn run(&mut self, case: &Case) -> Answer {
        let (Layout::Window(mode), Run::Instruction(until)) = (case.layout, case.run) else {
            return Answer::cannot("the host runs single ring-3 instructions only");
        };
        if !in_window(case) {
            return Answer::cannot("the case has memory outside the window");
        }
        for (gpa, bytes) in case.pieces() {
            self.cpu.write((gpa - PHYSICAL) as usize, &bytes);
        }
        let answer = self.execute(case, mode, until);
        self.restore(case);
        answer
    }

    fn settle(&mut self) -> Result<(), String> {
        let mut now = vec![0; BYTES];
        self.cpu.read(0, &mut now);
        if now == background() {
            return Ok(());
        }
        let at = now.iter().zip(background()).position(|(a, b)| a != b).unwrap_or(0);
        self.cpu.write(0, background());
        Err(format!("wrote at window offset {at:#x}, which the case doesn't declare"))
    }
}

/// Whether all memory of the case is in the window.
pub fn in_window(case: &Case) -> bool {
    let window = PHYSICAL..=PHYSICAL + BYTES as u64;
    case.ranges().all(|Range { start, end }| window.contains(&start) && window.contains(&end) && start <= end)
}
