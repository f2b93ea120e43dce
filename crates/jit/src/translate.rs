//! From a canonical block to host code.
//!
//! A trace's head charges the cost of all its blocks and leaves if the budget doesn't reach; their operations follow; the
//! end goes to another translation. Behind that lie the rarely executed parts: operations that missed the MMU's table,
//! exits without a link. What leaves the trace before its end, or calls a function, first gives back what is charged for the
//! blocks behind the one that it is in: whoever is not in generated code only ever sees that block charged.

mod exits;
mod slow;
mod tools;

use crate::branch::Search;
use crate::contexts::Half;
use crate::emitter::{Alu, Emitter, Jump, cc};
use crate::frame::{code_base, frame_field};
use crate::groups::{BASES, Groups, Member};
use crate::mechanisms::{Mechanism, Mechanisms};
use crate::memory_path::Cold;
use crate::plan::{Kind, Step, plan, regard_groups};
use crate::recipes::Recipe;
use crate::registers::A;
use crate::renaming::Unencodable;
use crate::returns::{Elsewhere, TooDeep};
use crate::stubs::Stubs;
use crate::system::System;
use crate::traces::Each;
use crate::windows::{Fault, Guess, Known, is_of_use};
use crate::{memory_path, traces, vector, x87};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use smallvec::SmallVec;
use umbra_cpu::block::Block;
use umbra_cpu::op::Op;

pub use exits::{Exit, LOOKUP_BYTES, dropped_code, jump, other_code};
pub use tools::Tools;

use exits::{Open, emit_exit};
use slow::Slow;
use tools::Rare;

/// Bits of a site that say which operation of its block is meant.
pub const OP_BITS: u32 = 6;
const _: () = assert!(umbra_cpu::block::MAX_OPS <= 1 << OP_BITS);

/// The block and the operation that a site is.
pub const fn of_site(site: u32) -> (u32, usize) {
    (site >> OP_BITS, (site & ((1 << OP_BITS) - 1)) as usize)
}

/// A translation to be placed where its emitter was told.
#[derive(Default)]
pub struct Code {
    /// How many blocks of the trace it has.
    pub parts: usize,
    /// What its head takes from the budget.
    pub charge: u32,
    pub bytes: Vec<u8>,
    /// How many of the bytes are executed often; where the others are to be placed was told, too.
    pub often: usize,
    pub exits: Vec<Exit>,
    /// Where it accesses windows, in the order of addresses.
    pub faults: Vec<Fault>,
    /// Operations that are done by their functions.
    pub helpers: usize,
    /// Where each operation's code begins in `bytes`, in what way it is done; then where the last one's ends.
    pub starts: Vec<(usize, Option<Kind>)>,
}

/// The state of one translation.
pub struct Translator<'a> {
    pub e: Emitter,
    pub block: &'a Block,
    /// The guest's code: its bytes.
    pub bytes: &'a [u8],
    /// It is 32-bit code: addresses, RIPs and the stack pointer have 32 bits.
    pub narrow: bool,
    /// The host's status flags are the guest's.
    pub host_flags: bool,
    pub vectors: vector::Place,
    pub x87: x87::Place,
    pub windows: Option<Guess<'a>>,
    /// Regions of base registers.
    pub known: Known,
    /// A base register's region, found by the running operation, is of use behind it.
    pub of_use: bool,
    /// Where the running operation's first access through a window begins.
    pub through_window: Option<usize>,
    /// Operations with such accesses: from where to where, and their slow paths.
    faults: Vec<(usize, usize, usize)>,
    /// Accesses whose ranges are missed.
    pub cold: Vec<Cold>,
    pub elsewhere_in_memory: Vec<memory_path::Elsewhere>,
    /// Operations, by bits, that ranges are no good for.
    pub missing: u64,
    /// Much time is spent in the block.
    pub hot: bool,
    pub groups: &'a Groups,
    /// The groups, by base register, whose checks have been emitted.
    pub checked: [Option<u8>; BASES],
    /// Lookups of the running operation so far.
    pub lookups: usize,
    /// The block ends with a branch a little back.
    pub closes_loop: bool,
    pub searches: Vec<Search>,
    pub stubs: &'a Stubs,
    /// Where the block is, and all that it is linked to.
    pub half: Half,
    number: u32,
    charge: u32,
    pub ahead: u32,
    slow: Vec<Slow>,
    /// The last of them is the running operation's.
    has_slow: bool,
    /// Where the code of each begins.
    slow_paths: SmallVec<[usize; 8]>,
    exits: SmallVec<[Open; 3]>,
    end: End,
    pub predicts_returns: bool,
    pub elsewhere: Vec<Elsewhere>,
    pub too_deep: Vec<TooDeep>,
    /// The host's flags that the branch looks at aren't saved.
    unsaved: bool,
    /// How flags are found that aren't saved when it begins.
    recipe: Option<Recipe>,
    /// Where it begins.
    head: usize,
    spent: Option<Jump>,
    /// Branches that leave the trace, and where to.
    sides: SmallVec<[(Jump, u64); 1]>,
    /// Jumps to where an operation and all that follow are done by their functions.
    by_function: Vec<(usize, Jump)>,
}

/// A block to be translated.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub block: &'a Block,
    pub number: u32,
    pub bytes: &'a [u8],
    /// Operations, by bits, that ranges are no good for.
    pub missing: u64,
    /// Much time is spent in it.
    pub hot: bool,
    /// Base registers, by bits, that groups are no good for.
    pub alone: u32,
}

/// How all of it is translated.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    pub half: Half,
    /// Mechanisms that aren't used.
    pub off: Mechanisms,
    pub stubs: &'a Stubs,
    /// Where operands are, if accesses go through windows.
    pub windows: Option<Guess<'a>>,
}

/// Where code goes in the code memory: what is executed often, and what is not.
#[derive(Clone, Copy)]
pub struct Offsets {
    pub often: usize,
    pub rare: usize,
}

/// A block of a trace and what is to be done with it.
pub struct Part<'a> {
    source: Source<'a>,
    pub instructions: &'a [Instruction],
    pub steps: &'a mut [Step],
    groups: Groups,
    /// How flags are found that aren't saved when it begins.
    pub recipe: Option<Recipe>,
    pub end: End,
    /// What its head takes from the budget; 0: it has none.
    pub charge: u32,
    /// What has been taken for the blocks behind it.
    pub ahead: u32,
}

/// How a block's direct branch goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// To other translations, both ways.
    Exits,
    /// Behind it comes the trace's next block, where it isn't taken.
    Falls,
    /// Where it is taken, as a JMP always is.
    Enters,
    /// To this block's head, where it is taken.
    Loops,
}

impl<'a> Part<'a> {
    fn new(source: Source<'a>, instructions: &'a [Instruction], steps: &'a mut [Step]) -> Self {
        let charge = source.block.cost;
        Self { source, instructions, steps, groups: Groups::default(), recipe: None, end: End::Exits, charge, ahead: 0 }
    }

    /// Whether what follows it in memory may come behind it.
    pub fn may_fall(&self) -> bool {
        self.steps.last().is_some_and(|step| step.kind == Kind::Jcc)
    }

    /// Whether operation `at` is its branch, behind which the trace's next part comes.
    pub fn goes_on_behind(&self, at: usize) -> bool {
        at + 1 == self.steps.len() && matches!(self.end, End::Falls | End::Enters)
    }

    /// As a block whose groups are planned.
    pub fn member(&self) -> Member<'_> {
        let Source { block, alone, .. } = self.source;
        Member { instructions: self.instructions, ops: &block.ops, steps: self.steps, alone }
    }

    pub fn take_groups(&mut self, groups: Groups, off: Mechanisms) {
        regard_groups(self.steps, self.instructions, &groups, off);
        self.groups = groups;
    }

    pub fn block(&self) -> &'a Block {
        self.source.block
    }
}

/// Translates a trace for these offsets of the code memory. The numbers of the exits begin with `first_exit`.
pub fn translate(
    trace: &[Source<'_>],
    at: Offsets,
    first_exit: usize,
    settings: Settings<'_>,
    tools: &mut Tools,
) -> Code {
    let (mut instructions, mut steps) = (std::mem::take(&mut tools.instructions), std::mem::take(&mut tools.steps));
    let mut parts = parts(trace, settings.off, &mut instructions, &mut steps);
    traces::join(&mut parts, settings.off, &mut tools.info);
    let native = emit(&parts, at, first_exit, settings, tools);
    drop(parts);
    let code = native.unwrap_or_else(|Unencodable| {
        // Every operation by its function: no encoder is asked.
        let first = trace[0];
        let mut steps = vec![Step::HELPER; first.block.ops.len()];
        emit(&[Part::new(first, &[], &mut steps)], at, first_exit, settings, tools).unwrap_or_default()
    });
    (tools.instructions, tools.steps) = (instructions, steps);
    code
}

/// The blocks of a trace, decoded and planned each by itself.
fn parts<'a>(
    trace: &[Source<'a>],
    off: Mechanisms,
    instructions: &'a mut Vec<Instruction>,
    steps: &'a mut Vec<Step>,
) -> Each<Part<'a>> {
    instructions.clear();
    let decoded: Each<_> = trace.iter().map(|source| decode(source.block, source.bytes, instructions)).collect();
    steps.clear();
    steps.resize(trace.iter().map(|source| source.block.ops.len()).sum(), Step::HELPER);
    let (mut instructions, mut steps) = (&instructions[..], &mut steps[..]);
    let parts = trace.iter().zip(decoded).map(|(&source, decoded)| {
        let (own, others) = instructions.split_at(decoded);
        let (own_steps, other_steps) = std::mem::take(&mut steps).split_at_mut(source.block.ops.len());
        (instructions, steps) = (others, other_steps);
        plan(own, &source.block.ops, off, own_steps);
        Part::new(source, own, own_steps)
    });
    parts.collect()
}

/// The code of parts, each of which goes on with the next one.
fn emit(
    parts: &[Part<'_>],
    at: Offsets,
    first_exit: usize,
    settings: Settings<'_>,
    tools: &mut Tools,
) -> Result<Code, Unencodable> {
    let mut code = tools.code(parts);
    let mut e = std::mem::take(&mut tools.emitter);
    e.begin(at.often);
    let mut translators = Each::new();
    let mut checked = [None; BASES];
    let mut known = Known::default();
    for part in parts {
        let rare = tools.rare.pop().unwrap_or_default();
        translators.push(Translator::new(part, settings, e, rare));
        let Some(translator) = translators.last_mut() else { return Err(Unencodable) };
        // Numbers of groups are unique in a trace.
        translator.checked = checked;
        if part.end != End::Loops {
            translator.known = known;
        }
        translator.run(part, &mut code.starts)?;
        code.helpers += part.steps.iter().filter(|step| step.kind == Kind::Helper).count();
        e = std::mem::take(&mut translator.e);
        checked = translator.checked;
        known = translator.known;
    }
    code.starts.push((e.bytes.len(), None));
    for translator in &mut translators {
        translator.e = e;
        translator.emit_sides();
        e = std::mem::take(&mut translator.e);
    }
    // A dropped block's code must have room.
    while e.bytes.len() < LOOKUP_BYTES {
        e.raw(&[0xcc]);
    }
    code.often = e.bytes.len();
    e.go_on_at(at.rare);
    for translator in &mut translators {
        translator.e = e;
        translator.emit_rare();
        code.faults.extend(translator.known_faults());
        e = std::mem::take(&mut translator.e);
    }
    for open in translators.iter_mut().flat_map(|translator| translator.exits.drain(..)) {
        let number = first_exit + code.exits.len();
        let unlinked = emit_exit(&mut e, &open, number, settings.stubs);
        code.exits.push(open.exit);
        // Put in afterwards: the copy is of what was written long ago.
        code.exits.last_mut().into_iter().for_each(|exit| exit.unlinked = unlinked);
    }
    let rare = |translator: &mut Translator<'_>| Rare {
        slow: std::mem::take(&mut translator.slow),
        cold: std::mem::take(&mut translator.cold),
    };
    tools.rare.extend(translators.iter_mut().map(rare));
    code.bytes = std::mem::take(&mut e.bytes);
    tools.emitter = e;
    Ok(code)
}

/// Appends the block's instructions, and says how many: none where segments aren't flat or the bytes don't say the same.
fn decode(block: &Block, bytes: &[u8], instructions: &mut Vec<Instruction>) -> usize {
    if !block.is_relative() {
        return 0;
    }
    let first = instructions.len();
    let mut decoder = Decoder::with_ip(block.bits(), bytes, block.rip, DecoderOptions::NONE);
    for op in &block.ops {
        let i = decoder.decode();
        if i.is_invalid() || i.len() != usize::from(op.len) {
            instructions.truncate(first);
            break;
        }
        instructions.push(i);
    }
    instructions.len() - first
}

/// Bytes of a loop's code at most.
const LOOP_BYTES: u64 = 256;

/// Whether a block ends with a branch that goes to its beginning or a little further back.
fn closes_loop(block: &Block, steps: &[Step]) -> bool {
    let branches = steps.last().is_some_and(|step| matches!(step.kind, Kind::Jcc | Kind::Jmp));
    branches && block.ops.last().is_some_and(|op| block.rip.wrapping_sub(op.imm) < LOOP_BYTES)
}

impl<'a> Translator<'a> {
    fn new(part: &'a Part<'_>, settings: Settings<'a>, e: Emitter, Rare { slow, cold }: Rare) -> Self {
        let Source { block, number, bytes, missing, hot, .. } = part.source;
        let Settings { half, stubs, off, windows } = settings;
        Self {
            e,
            block,
            bytes,
            narrow: block.is_narrow(),
            host_flags: false,
            vectors: vector::Place::default(),
            x87: x87::Place::default(),
            windows,
            known: Known::default(),
            of_use: false,
            through_window: None,
            faults: Vec::new(),
            elsewhere_in_memory: Vec::new(),
            cold,
            missing,
            hot,
            groups: &part.groups,
            checked: [None; BASES],
            lookups: 0,
            closes_loop: closes_loop(block, part.steps),
            searches: Vec::new(),
            stubs,
            half,
            number,
            charge: part.charge,
            ahead: part.ahead,
            slow,
            has_slow: false,
            slow_paths: SmallVec::new(),
            exits: SmallVec::new(),
            end: part.end,
            predicts_returns: !off.has(Mechanism::Returns),
            elsewhere: Vec::new(),
            too_deep: Vec::new(),
            unsaved: part.steps.iter().any(|step| step.unsaved),
            recipe: part.recipe,
            head: 0,
            spent: None,
            sides: SmallVec::new(),
            by_function: Vec::new(),
        }
    }

    fn run(&mut self, part: &Part<'_>, starts: &mut Vec<(usize, Option<Kind>)>) -> Result<(), Unencodable> {
        let (instructions, steps) = (part.instructions, &*part.steps);
        self.head = self.e.here();
        if !self.block.is_relative() {
            // Its RIPs aren't those of a page, which the jump table's count from.
            self.e.store_imm(code_base(), 0);
        }
        if self.charge > 0 {
            self.e.alu_mem_imm(Alu::Sub, frame_field!(budget), self.charge as i32);
            self.spent = Some(self.e.jcc(cc::SIGN));
        }
        for (at, step) in steps.iter().enumerate() {
            starts.push((self.e.bytes.len(), Some(step.kind)));
            match step.kind {
                Kind::Helper => {
                    self.call_function(at, instructions.get(at));
                    self.known = Known::default();
                }
                _ => {
                    let base = self.block.ops[at].base;
                    let plain = self.windows.is_some() && step.kind.finds_region();
                    let stack = matches!(step.kind, Kind::Push | Kind::Pop);
                    self.of_use = plain && (stack || is_of_use(at, base, &self.block.ops, instructions));
                    self.native(at, &instructions[at], *step)?;
                    self.known.follow(&instructions[at], step.kind);
                }
            }
        }
        match steps.last().map(|step| step.kind) {
            Some(Kind::Helper) | None => self.e.jmp_to(self.stubs.dispatch),
            Some(kind) if kind.is_branch() => {}
            Some(_) => {
                self.store_pointers();
                self.exit(self.block.end_rip);
            }
        }
        Ok(())
    }

    /// What is rarely executed.
    fn emit_rare(&mut self) {
        if let Some(spent) = self.spent.take() {
            self.e.bind(spent);
            if let Some(recipe) = self.recipe {
                self.recover_flags(&recipe);
            }
            self.give_back();
            self.e.mov_imm(A, u64::from(self.number << OP_BITS));
            self.e.jmp_to(self.stubs.budget);
        }
        self.emit_cold();
        self.emit_searches();
        self.emit_returns();
        self.emit_vector_loads();
        self.emit_x87_loads();
        self.emit_slow();
        self.emit_by_function();
    }

    fn native(&mut self, at: usize, i: &Instruction, step: Step) -> Result<(), Unencodable> {
        if step.kind.is_branch() {
            self.store_pointers();
        }
        self.lookups = 0;
        self.has_slow = step.kind.may_give_up(i);
        if self.has_slow {
            let pointers = self.x87.pointers;
            let (x87, recipe) = (step.kind == Kind::X87, step.recipe);
            let forbids_x87 = step.kind == Kind::System(System::ControlRegister);
            self.slow.push(Slow { op: at, x87, forbids_x87, pointers, recipe, ..Slow::default() });
        }
        let op: &Op = &self.block.ops[at];
        let windows = self.windows.take_if(|_| !step.kind.may_fault());
        let done = self.kind(at, i, op, step);
        self.windows = self.windows.or(windows);
        if let Some(start) = self.through_window.take() {
            self.faults.push((start, self.e.here(), self.slow_number()));
            self.slow.last_mut().into_iter().for_each(|slow| slow.faults = true);
        }
        done
    }

    fn kind(&mut self, at: usize, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        match step.kind {
            kind if kind.is_branch() => {
                self.branch(at, i, op, kind);
                return Ok(());
            }
            Kind::Vector => self.vector(at, i, op, step.live)?,
            Kind::X87 => self.x87(at, i, op, step.live)?,
            _ => self.data(i, op, step)?,
        }
        if let Some(slow) = self.slow.last_mut().filter(|_| self.has_slow) {
            (slow.back, slow.flags) = (Some(self.e.here()), self.host_flags);
            slow.vectors = self.vectors.live;
        }
        Ok(())
    }

    /// Accesses through windows, after [`emit_rare`](Self::emit_rare).
    fn known_faults(&mut self) -> impl Iterator<Item = Fault> {
        let faults = std::mem::take(&mut self.faults);
        faults.into_iter().map(|(start, end, slow)| Fault {
            start: start as u32,
            end: end as u32,
            slow: self.slow_paths[slow] as u32,
        })
    }

    /// Operation `op` has no host code.
    fn call_function(&mut self, op: usize, i: Option<&Instruction>) {
        self.store_pointers();
        if i.is_none_or(x87::concerns) {
            self.e.call(self.stubs.x87_store);
            self.x87.is_live = false;
        }
        self.helper(op);
        self.vectors.live = 0;
    }

    /// The site of operation `op`.
    pub fn site(&self, op: usize) -> u32 {
        self.number << OP_BITS | op as u32
    }

    /// Does operation `op` by its function.
    fn helper(&mut self, op: usize) {
        self.give_back();
        self.e.mov_imm(A, self.site(op).into());
        self.e.call(self.stubs.helper);
        self.host_flags = false;
        if self.ahead > 0 {
            debug_assert!(op + 1 < self.block.ops.len(), "behind a block in a trace lies its branch");
            self.e.alu_mem_imm(Alu::Sub, frame_field!(budget), self.ahead as i32);
            let spent = self.e.jcc(cc::SIGN);
            self.by_function(op + 1, spent);
        }
    }

    /// The budget as if only this block of the trace were charged.
    fn give_back(&mut self) {
        if self.ahead > 0 {
            self.e.alu_mem_imm(Alu::Add, frame_field!(budget), self.ahead as i32);
        }
    }
}
