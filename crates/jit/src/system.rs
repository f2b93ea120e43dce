//! Operations of system code: the interrupt flag, selectors.

use crate::emitter::{Alu, cc};
use crate::engine::ROOM;
use crate::frame::{self, frame_field, gpr, selected};
use crate::memory_path::{Access, Address};
use crate::registers::{A, B, GUEST_RAX, RCX, RDX, guest, home};
use crate::system_calls::{jump_if_any, set_status, unless_byte, whole_flags};
use crate::translate::Translator;
use crate::views::{AC_STEP, NARROW_STEP, WP_STEP, offset_of_view};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::rflags;
use umbra_arch::segment::Seg;
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

/// An operation of system code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum System {
    /// CLI.
    Cli,
    /// CLD and STD.
    Direction { set: bool },
    /// PAUSE.
    Pause,
    /// RDTSC or RDTSCP.
    TimeStamp { aux: bool },
    /// PUSHFQ, PUSHFD in 32-bit code.
    PushFlags,
    /// POPFQ, POPFD in 32-bit code.
    PopFlags,
    /// MOV from a segment register to a general one of at least 32 bits.
    Selector,
    /// SWAPGS.
    SwapGs,
    /// RDFSBASE, RDGSBASE.
    ReadBase(Seg),
    /// WRFSBASE, WRGSBASE.
    WriteBase(Seg),
    /// RDPKRU.
    ReadPkru,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// INVLPG.
    InvalidatePage,
    /// STI.
    Sti,
    /// STAC and CLAC.
    AccessFlag { set: bool },
    /// MOV from CR0, CR2, CR3 or CR4.
    ReadControl(u8),
    /// MOV to CR0.
    ControlRegister,
    /// SYSCALL.
    Syscall,
    /// SYSRETQ.
    Sysret,
    /// INT n, by its vector.
    Interrupt(u8),
    /// IRETQ.
    InterruptReturn,
}

impl System {
    /// Which of them `i` is.
    pub fn of(i: &Instruction) -> Option<Self> {
        match i.mnemonic() {
            M::Cli => Some(Self::Cli),
            M::Cld => Some(Self::Direction { set: false }),
            M::Std => Some(Self::Direction { set: true }),
            // With REX.B it is XCHG.
            M::Pause if i.len() == 2 => Some(Self::Pause),
            M::Rdtsc => Some(Self::TimeStamp { aux: false }),
            M::Rdtscp => Some(Self::TimeStamp { aux: true }),
            M::Pushfq | M::Pushfd => Some(Self::PushFlags),
            M::Popfq | M::Popfd => Some(Self::PopFlags),
            M::Swapgs => Some(Self::SwapGs),
            M::Rdfsbase => Some(Self::ReadBase(Seg::Fs)),
            M::Rdgsbase => Some(Self::ReadBase(Seg::Gs)),
            M::Wrfsbase => Some(Self::WriteBase(Seg::Fs)),
            M::Wrgsbase => Some(Self::WriteBase(Seg::Gs)),
            M::Rdpkru => Some(Self::ReadPkru),
            M::Rdmsr => Some(Self::ReadMsr),
            M::Wrmsr => Some(Self::WriteMsr),
            M::Invlpg => Some(Self::InvalidatePage),
            M::Sti => Some(Self::Sti),
            M::Stac => Some(Self::AccessFlag { set: true }),
            M::Clac => Some(Self::AccessFlag { set: false }),
            M::Syscall => Some(Self::Syscall),
            M::Sysretq => Some(Self::Sysret),
            M::Int => Some(Self::Interrupt(i.immediate8())),
            M::Iretq => Some(Self::InterruptReturn),
            M::Mov if i.op0_register() == Register::CR0 => Some(Self::ControlRegister),
            M::Mov if matches!(i.op1_register(), Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4) => {
                Some(Self::ReadControl(i.op1_register().number() as u8))
            }
            M::Mov
                if i.op_count() == 2 && i.op1_kind() == OpKind::Register && i.op1_register().is_segment_register() =>
            {
                let wide = i.op0_kind() == OpKind::Register && i.op0_register().size() >= 4;
                wide.then_some(Self::Selector)
            }
            _ => None,
        }
    }

    /// Whether it goes on somewhere else.
    pub fn is_branch(self) -> bool {
        matches!(self, Self::Syscall | Self::Sysret | Self::Interrupt(_) | Self::InterruptReturn)
    }

    /// Whether 32-bit code can do it.
    pub fn is_narrow(self) -> bool {
        let plain =
            matches!(self, Self::Cli | Self::Sti | Self::Direction { .. } | Self::Pause | Self::TimeStamp { .. });
        let flags = matches!(self, Self::PushFlags | Self::PopFlags);
        let views = matches!(self, Self::AccessFlag { .. } | Self::ControlRegister | Self::InvalidatePage);
        plain || flags || views || matches!(self, Self::Selector | Self::ReadPkru | Self::ReadControl(_))
    }

    /// Whether it changes what memory may be accessed.
    pub fn changes_view(self) -> bool {
        self.is_branch() || matches!(self, Self::AccessFlag { .. } | Self::ControlRegister)
    }
}

impl Translator<'_> {
    /// An operation of system code. Its slow path is open.
    pub fn system(&mut self, i: &Instruction, op: &Op, system: System) {
        match system {
            System::Cli => self.cli(),
            System::Direction { set } => self.flag(rflags::DF, set),
            System::Pause => self.pause(),
            System::TimeStamp { aux } => self.time_stamp(op, aux),
            System::PushFlags => self.push_flags(),
            System::PopFlags => self.pop_flags(),
            System::Selector => self.selector(i),
            System::SwapGs => self.swap_gs(),
            System::ReadBase(seg) => self.read_base(i, seg),
            System::WriteBase(seg) => self.write_base(i, seg),
            System::ReadPkru => self.read_pkru(),
            System::ReadMsr => self.read_msr(),
            System::WriteMsr => self.write_msr(),
            System::InvalidatePage => self.invalidate_page(op),
            System::Sti => self.sti(),
            System::AccessFlag { set } => self.access_flag(set),
            System::ReadControl(number) => self.read_control(i, number),
            System::ControlRegister => self.write_cr0(i),
            System::Syscall | System::Sysret | System::Interrupt(_) | System::InterruptReturn => {}
        }
    }

    /// CLI with CPL 0; any other goes by IOPL and may fault.
    fn cli(&mut self) {
        self.only_in_ring_0();
        self.flag(rflags::IF, false);
    }

    /// One of the flags that the core has.
    fn flag(&mut self, flag: u64, set: bool) {
        self.host_flags = false;
        let (extension, bits) = if set { (1, flag as u32) } else { (4, !(flag as u32)) };
        self.e.rm(false, &[0x81], extension, frame::rflags()); // or, and dword
        self.e.raw(&bits.to_le_bytes());
    }

    /// RDPKRU with ECX and the upper halves as they should be.
    fn read_pkru(&mut self) {
        self.needs_cr4(Cr4::PKE);
        self.e.rr(false, &[0x85], RCX, RCX); // test
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
        self.e.load32(GUEST_RAX, frame::pkru());
        self.e.mov_imm(RDX, 0);
    }

    /// What needs a bit of CR4 can fault without it.
    pub fn needs_cr4(&mut self, bit: u64) {
        self.host_flags = false;
        self.e.rm(false, &[0xf7], 0, frame::control(4)); // test dword
        self.e.raw(&(bit as u32).to_le_bytes());
        let forbidden = self.e.jcc(cc::EQUAL);
        self.slow(forbidden);
    }

    pub fn only_in_ring_0(&mut self) {
        self.host_flags = false;
        self.e.rm(false, &[0x80], 7, frame::cpl()); // cmp byte
        self.e.raw(&[0]);
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
    }

    /// STI with CPL 0 while no interrupt waits; its shadow passes unseen while the budget lasts for a block more.
    fn sti(&mut self) {
        self.only_in_ring_0();
        self.e.rm(false, &[0xf7], 0, frame::rflags()); // test dword
        self.e.raw(&(rflags::IF as u32).to_le_bytes());
        let set = self.e.jcc(cc::NOT_EQUAL);
        self.e.rm(false, &[0x80], 7, frame_field!(interrupt)); // cmp byte
        self.e.raw(&[0]);
        let waits = self.e.jcc(cc::NOT_EQUAL);
        self.slow(waits);
        self.e.alu_mem_imm(Alu::Cmp, frame_field!(budget), ROOM as i32);
        let ends = self.e.jcc(cc::SIGN);
        self.slow(ends);
        self.flag(rflags::IF, true);
        self.e.bind(set);
    }

    /// The view at [`B`] is taken.
    fn change_view(&mut self) {
        self.e.call(self.stubs.change_view);
        let unknown = self.e.jcc(cc::NOT_EQUAL);
        self.slow(unknown);
    }

    fn access_flag(&mut self, set: bool) {
        self.only_in_ring_0();
        self.e.load(A, frame::cr0());
        self.supervisor_view(0);
        let narrow = if self.narrow { NARROW_STEP } else { 0 };
        self.e.alu_imm(Alu::Add, true, B, offset_of_view(false, set, false) as i32 + narrow);
        self.change_view();
        self.flag(rflags::AC, set);
    }

    /// To [`B`]: where the supervisor's view is that bits of [`A`] ask for: WP there, and the bit in RFLAGS that AC is if
    /// `ac` says so.
    fn supervisor_view(&mut self, ac: u64) {
        self.e.shr(false, A, Cr0::WP.trailing_zeros() as u8);
        self.e.alu_imm(Alu::And, false, A, 1);
        self.e.rr(true, &[0x69], B, A); // imul
        self.e.raw(&WP_STEP.to_le_bytes());
        if ac != 0 {
            self.e.load32(A, frame::rflags());
            self.e.shr(false, A, ac.trailing_zeros() as u8);
            self.e.alu_imm(Alu::And, false, A, 1);
            self.e.rr(true, &[0x69], A, A); // imul
            self.e.raw(&AC_STEP.to_le_bytes());
            self.e.alu(Alu::Add, true, B, A);
        }
    }

    fn read_control(&mut self, i: &Instruction, number: u8) {
        self.only_in_ring_0();
        let general = register_index(i.op0_register());
        let to = home(general).unwrap_or(A);
        self.load_slot(to, frame::control(number));
        if home(general).is_none() {
            self.e.store(gpr(general), A);
        }
    }

    /// MOV to CR0 that changes WP alone.
    fn write_cr0(&mut self, i: &Instruction) {
        self.only_in_ring_0();
        self.e.rm(false, &[0x80], 7, frame_field!(wp_usable)); // cmp byte
        self.e.raw(&[1]);
        let forbidden = self.e.jcc(cc::NOT_EQUAL);
        self.slow(forbidden);
        let from = register_index(i.op1_register());
        match home(from) {
            Some(register) if self.narrow => self.e.mov32(A, register),
            Some(register) => self.e.mov(A, register),
            None => self.e.load(A, gpr(from)),
        }
        self.e.mov(B, A);
        self.e.alu_mem(Alu::Xor, true, B, frame::cr0());
        self.e.alu_imm(Alu::Cmp, true, B, Cr0::WP as i32);
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
        self.supervisor_view(rflags::AC);
        let narrow = if self.narrow { NARROW_STEP } else { 0 };
        self.e.alu_imm(Alu::Add, true, B, offset_of_view(false, false, false) as i32 + narrow);
        self.change_view();
        self.e.rm(false, &[0x81], 6, frame::cr0()); // xor dword
        self.e.raw(&(Cr0::WP as u32).to_le_bytes());
        self.e.rm(true, &[0xff], 0, frame_field!(wp_changes)); // inc
    }

    /// The block ends with an operation of system code.
    pub fn system_call(&mut self, system: System, site: u32, next: u64) {
        match system {
            System::Syscall => {
                self.e.mov_imm(A, site.into());
                self.e.mov_imm(B, next);
                self.e.jmp_to(self.stubs.system_call);
            }
            System::Interrupt(vector) => {
                self.e.store_imm32(frame_field!(call_site), site);
                self.e.mov_imm(A, u64::from(vector) * 16);
                self.e.mov_imm(B, next);
                self.e.jmp_to(self.stubs.interrupt);
            }
            System::InterruptReturn => {
                let top = self.lookup(&Address::above(guest::RSP, 0), 40, Access::Read);
                self.e.store_imm32(frame_field!(call_site), site);
                self.e.lea(A, top.mem);
                self.e.jmp_to(self.stubs.interrupt_return);
            }
            _ => {
                self.e.mov_imm(A, site.into());
                self.e.jmp_to(self.stubs.system_return);
            }
        }
    }

    fn swap_gs(&mut self) {
        self.only_in_ring_0();
        self.e.load(A, frame::kernel_gs_base());
        self.e.load(B, frame::segment_base(Seg::Gs as usize));
        self.e.store(frame::kernel_gs_base(), B);
        self.e.store(frame::segment_base(Seg::Gs as usize), A);
        self.e.store(frame::seg_base(Seg::Gs as u8), A);
    }

    /// INVLPG of an address that is canonical whatever the paging mode: counted, as the MMU does.
    fn invalidate_page(&mut self, op: &Op) {
        self.only_in_ring_0();
        self.linear(&Address::of(op));
        self.only_canonical();
        self.e.rm(true, &[0xff], 0, frame_field!(page_flushes)); // inc
    }

    /// Nothing, unless other CPUs may go first.
    fn pause(&mut self) {
        self.host_flags = false;
        let _ = self.e.cmp_mem_imm(frame::cpus(), 1);
        let others = self.e.jcc(cc::NOT_EQUAL);
        self.slow(others);
    }

    /// The TSC is the virtual time, which is when the budget ends less what is left of it, and an offset.
    fn time_stamp(&mut self, op: &Op, aux: bool) {
        self.host_flags = false;
        self.e.rm(false, &[0x80], 7, selected!(tsc_usable)); // cmp byte
        self.e.raw(&[1]);
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
        self.e.load(A, frame_field!(end));
        self.e.alu_mem(Alu::Sub, true, A, frame_field!(bank));
        self.e.alu_mem(Alu::Add, true, A, frame::tsc_offset());
        self.e.alu_mem(Alu::Sub, true, A, frame_field!(budget));
        // All of the block and those behind it is charged.
        self.e.alu_imm(Alu::Sub, true, A, (self.block.cost + self.ahead - op.prefix) as i32);
        self.e.mov32(GUEST_RAX, A);
        self.e.shr(true, A, 32);
        self.e.mov(RDX, A);
        if aux {
            self.e.load32(RCX, frame::tsc_aux());
        }
    }

    /// Status flags from where they are packed, the others from the core; RF and VM read as 0.
    fn push_flags(&mut self) {
        self.host_flags = false;
        whole_flags(&mut self.e, A, B);
        self.e.store(frame_field!(scratch), A);
        let down = -(self.slot() as i32);
        let top = self.lookup(&Address::above(guest::RSP, down), self.slot(), Access::Write);
        self.e.load(top.free, frame_field!(scratch));
        self.store_slot(top.mem, top.free);
        self.move_stack(down);
    }

    /// POPFQ with CPL 0 that leaves TF clear and AC as it is.
    fn pop_flags(&mut self) {
        const LOADED: u64 =
            rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::ID;
        self.only_in_ring_0();
        let top = self.lookup(&Address::above(guest::RSP, 0), self.slot(), Access::Read);
        self.load_slot(A, top.mem);
        let traps = jump_if_any(&mut self.e, A, rflags::TF);
        self.slow(traps);
        self.e.mov(B, A);
        self.e.alu_mem(Alu::Xor, true, B, frame::rflags());
        let view = jump_if_any(&mut self.e, B, rflags::AC);
        self.slow(view);
        // An interrupt that waits is taken when IF becomes set.
        self.e.rr(false, &[0xf7], 0, A); // test
        self.e.raw(&(rflags::IF as u32).to_le_bytes());
        let clear = self.e.jcc(cc::EQUAL);
        let waits = unless_byte(&mut self.e, frame_field!(interrupt), 0);
        self.slow(waits);
        self.e.bind(clear);
        self.e.alu_imm(Alu::And, true, A, LOADED as i32);
        self.e.load(B, frame::rflags());
        self.e.alu_imm(Alu::And, true, B, !(LOADED as i32));
        self.e.alu(Alu::Or, true, A, B);
        self.e.store(frame::rflags(), A);
        set_status(&mut self.e);
        self.move_stack(self.slot() as i32);
    }

    fn selector(&mut self, i: &Instruction) {
        let general = register_index(i.op0_register());
        let to = home(general).unwrap_or(A);
        self.e.rm(false, &[0x0f, 0xb7], to, frame::selector(i.op1_register().number())); // movzx
        if home(general).is_none() {
            self.e.store(gpr(general), A);
        }
    }
}
