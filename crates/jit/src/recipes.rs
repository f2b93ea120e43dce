//! Status flags that nothing looks at but a function called in the middle of a block, or a fault there: they aren't
//! saved where they are written, but computed on that rare way, from registers that still hold what is needed.

use crate::bits::Bits;
use crate::emitter::Alu;
use crate::frame::{frame_field, gpr};
use crate::plan::{Kind, ShiftKind, has_memory, reads_flags, width, writes_all_flags, written_registers};
use crate::registers::{A, B, FLAGS, Reg, home};
use crate::shifts::shift_count;
use crate::translate::{Part, Translator};
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic as M, OpKind, Register};
use smallvec::SmallVec;
use umbra_arch::rflags;
use umbra_cpu::decode::register_index;

/// How the flags are computed anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recipe {
    how: How,
    /// Width in bytes.
    width: u32,
    /// The guest register that was the first operand.
    first: u8,
    second: Second,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    /// Those of 0.
    Zero,
    /// By the same again.
    Compare,
    Test,
    /// By TEST of the result with itself.
    Logic,
    /// By the reverse, then the same again.
    Add,
    Sub,
    Negate,
    /// By the same again with what is [kept](crate::frame::Frame::kept).
    Shift(ShiftKind),
    /// By what is kept of OF, and the result.
    Product,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Second {
    None,
    Register(u8),
    Immediate(u64),
}

impl Recipe {
    /// For the flags of `i`, which is done as `kind`, from what registers hold after it.
    fn of(i: &Instruction, kind: Kind) -> Option<Self> {
        let plain = |n: u32| i.op_kind(n) == OpKind::Register && !is_high_byte(i.op_register(n));
        if !plain(0) {
            return None;
        }
        let (width, first) = (width(i), register_index(i.op0_register()));
        match kind {
            Kind::Shift(kind) => {
                let second = Second::Immediate(shift_count(i).into());
                return Some(Self { how: How::Shift(kind), width, first, second });
            }
            // Its function keeps nothing.
            Kind::Imul if has_memory(i) => return None,
            Kind::Imul => return Some(Self { how: How::Product, width, first, second: Second::None }),
            Kind::Arithmetic => {}
            _ => return None,
        }
        let second = match i.op_count() {
            1 => Second::None,
            _ if plain(1) => Second::Register(register_index(i.op1_register())),
            _ if !matches!(i.op1_kind(), OpKind::Register | OpKind::Memory) => Second::Immediate(i.immediate(1)),
            _ => Second::None,
        };
        let itself = second == Second::Register(first);
        let how = match i.mnemonic() {
            M::Xor | M::Sub if itself => How::Zero,
            M::And | M::Or | M::Xor => How::Logic,
            M::Neg => How::Negate,
            _ if second == Second::None => return None,
            M::Cmp => How::Compare,
            M::Test => How::Test,
            M::Add if !itself => How::Add,
            M::Sub => How::Sub,
            _ => return None,
        };
        let second = if matches!(how, How::Zero | How::Logic) { Second::None } else { second };
        Some(Self { how, width, first, second })
    }

    /// Whether it can't be followed any more when guest register `n` is written.
    fn needs(&self, n: u8) -> bool {
        !matches!(self.how, How::Zero | How::Shift(_)) && (self.first == n || self.second == Second::Register(n))
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// An operation of a trace: its part, and where it is there.
type Place = (usize, usize);

/// Takes the saving of flags from operations that have a [`Recipe`], and gives that to those whose functions may be called, and
/// to those parts that may be left at their heads, before other flags replace them. Where a branch looks at flags that only
/// what leaves the trace wants besides, they are saved there.
pub fn plan(parts: &mut [Part<'_>], info: &mut InstructionInfoFactory) {
    let of_part = |(part, steps): (usize, &Part<'_>)| (0..steps.instructions.len()).map(move |at| (part, at));
    let places: SmallVec<[Place; 64]> = parts.iter().enumerate().flat_map(of_part).collect();
    for (n, &(part, at)) in places.iter().enumerate() {
        let (i, step) = (&parts[part].instructions[at], parts[part].steps[at]);
        let Some(recipe) = Recipe::of(i, step.kind).filter(|_| step.live) else { continue };
        let Some(found) = replaced(&recipe, parts, &places[n + 1..], info) else { continue };
        if found.over_branch && step.kind != Kind::Arithmetic {
            continue;
        }
        for &(part, at) in &places[n + 1..][..=found.after] {
            parts[part].steps[at].recipe = Some(recipe);
            if at == 0 {
                parts[part].recipe = Some(recipe);
            }
        }
        let step = &mut parts[part].steps[at];
        step.unsaved = found.over_branch;
        if !found.over_branch {
            step.live = false;
            step.keeps = matches!(step.kind, Kind::Shift(_) | Kind::Imul);
        }
    }
}

/// Where flags are replaced.
struct Replaced {
    /// So many operations later.
    after: usize,
    /// The branch behind the operation that they are of looks at them.
    over_branch: bool,
}

/// Where flags are replaced by those of one of the operations `behind`, unless anything else looks at them before or the
/// recipe is spoilt.
fn replaced(
    recipe: &Recipe,
    parts: &[Part<'_>],
    behind: &[Place],
    info: &mut InstructionInfoFactory,
) -> Option<Replaced> {
    let (mut spoilt, mut over_branch) = (false, false);
    for (after, &(part, at)) in behind.iter().enumerate() {
        let (i, kind) = (&parts[part].instructions[at], parts[part].steps[at].kind);
        if parts[part].goes_on_behind(at) {
            let is_left_at_head = parts[part + 1].charge > 0;
            if spoilt && is_left_at_head || kind == Kind::Jcc && after > 0 {
                return None;
            }
            over_branch |= kind == Kind::Jcc;
            continue;
        }
        if looks_at_flags(kind) || reads_flags(i) || spoilt && kind.accesses_memory(i) {
            return None;
        }
        if writes_all_flags(kind) {
            return Some(Replaced { after, over_branch });
        }
        spoilt |= written_registers(i, info).any(|register| recipe.needs(register));
    }
    None
}

/// Whether an operation wants the flags where they are saved, or changes some of them there.
fn looks_at_flags(kind: Kind) -> bool {
    let changes = match kind {
        Kind::Bits(bits) => bits != Bits::NoFlags && !bits.writes_all(),
        _ => matches!(
            kind,
            Kind::BitTest | Kind::BitString | Kind::Turn(_) | Kind::CompareExchange | Kind::CompareExchange16
        ),
    };
    let elsewhere = matches!(kind, Kind::Helper | Kind::Vector | Kind::X87 | Kind::System(_));
    let elsewhere = elsewhere || matches!(kind, Kind::Divide { .. } | Kind::Repeated(_));
    changes || elsewhere || kind.is_branch()
}

impl Translator<'_> {
    /// Computes the flags anew and saves them. Clobbers both scratch registers.
    pub fn recover_flags(&mut self, recipe: &Recipe) {
        if recipe.how == How::Zero {
            self.e.mov_imm32(FLAGS, ((rflags::ZF | rflags::PF | 2) << 8) as u32);
            return;
        }
        match recipe.how {
            How::Shift(_) => self.e.load(A, frame_field!(kept)),
            _ => self.guest_register(A, recipe.first),
        }
        match recipe.second {
            Second::Register(n) => self.guest_register(B, n),
            Second::Immediate(value) => self.e.mov_imm(B, value),
            Second::None => {}
        }
        let wide = recipe.width;
        match recipe.how {
            How::Zero => {}
            How::Compare => self.e.sized(wide, Alu::Cmp as u8, A, B),
            How::Test => self.e.sized(wide, TEST, A, B),
            How::Logic => self.e.sized(wide, TEST, A, A),
            How::Add => {
                self.e.sized(wide, Alu::Sub as u8, A, B);
                self.e.sized(wide, Alu::Add as u8, A, B);
            }
            How::Sub => {
                self.e.sized(wide, Alu::Add as u8, A, B);
                self.e.sized(wide, Alu::Sub as u8, A, B);
            }
            How::Shift(kind) => {
                let Second::Immediate(count) = recipe.second else { return };
                self.e.sized(wide, SHIFT, kind.extension(), A);
                self.e.raw(&[count as u8]);
                return self.shift_flags(kind, wide, count as u8, A);
            }
            How::Product => {
                self.e.load32(FLAGS, frame_field!(kept));
                return self.product_flags(A, wide);
            }
            How::Negate => {
                self.e.sized(wide, NEG, 3, A);
                self.e.sized(wide, NEG, 3, A);
            }
        }
        self.e.save_flags();
    }

    /// A guest register's value to a host register.
    pub fn guest_register(&mut self, to: Reg, n: u8) {
        match home(n) {
            Some(r) => self.e.mov(to, r),
            None => self.e.load(to, gpr(n)),
        }
    }
}

const TEST: u8 = 0x85;
const NEG: u8 = 0xf7;
/// By an immediate count.
const SHIFT: u8 = 0xc1;
