//! The ROMs' run time: serial output, checks, the report, exceptions, power-off.
//!
//! One source serves all three code widths: it uses 32-bit registers throughout, which reach everything
//! below 4 GiB in each of them. Routines clobber EAX, EBX, ECX, EDX, ESI and EDI.

use crate::link::{Code, Linker, RomError};
use crate::pc::{COM1, PM1A_CONTROL, POWER_OFF, selector, variable};
use iced_x86::code_asm::*;
use umbra_arch::descriptor;
use umbra_arch::segment::Attr;

type Done = Result<(), RomError>;

/// Column at which a section's counts start.
const COLUMN: usize = 48;
/// Software interrupt that ROMs may raise: it is counted.
pub const COUNTED_INTERRUPT: u32 = 0x30;
const VECTORS: u32 = COUNTED_INTERRUPT + 1;

/// Appends the run time for every width, the GDT and the IDTs.
pub fn runtime(l: &mut Linker) -> Done {
    for bits in [16, 32, 64] {
        l.code(bits, |c| {
            serial(c)?;
            decimal(c)?;
            end_section(c)?;
            result(c)
        })?;
    }
    for bits in [32, 64] {
        l.code(bits, exceptions)?;
        interrupt_table(l, bits)?;
    }
    global_table(l)
}

/// `print_char` prints BL, `print` the text at ESI.
fn serial(c: &mut Code<'_>) -> Done {
    let (mut wait, mut next, mut end, mut put) = labels(c);
    c.name_own("print_char")?;
    c.mov(dx, COM1 + 5)?;
    c.set_label(&mut wait)?;
    c.in_(al, dx)?;
    c.test(al, 0x20u32)?;
    c.je(wait)?;
    c.mov(dl, COM1 & 0xff)?;
    c.mov(al, bl)?;
    c.out(dx, al)?;
    c.ret()?;
    c.name_own("print")?;
    c.set_label(&mut next)?;
    c.mov(bl, byte_ptr(esi))?;
    c.inc(esi)?;
    c.test(bl, bl)?;
    c.je(end)?;
    c.cmp(bl, u32::from(b'\n'))?;
    c.jne(put)?;
    c.mov(bl, u32::from(b'\r'))?;
    c.call_own("print_char")?;
    c.mov(bl, u32::from(b'\n'))?;
    c.set_label(&mut put)?;
    c.call_own("print_char")?;
    c.jmp(next)?;
    c.set_label(&mut end)?;
    Ok(c.ret()?)
}

fn labels(c: &mut Code<'_>) -> (CodeLabel, CodeLabel, CodeLabel, CodeLabel) {
    (c.create_label(), c.create_label(), c.create_label(), c.create_label())
}

/// `print_decimal` prints EAX, `print_hex` EAX in hexadecimal.
fn decimal(c: &mut Code<'_>) -> Done {
    for (name, base) in [("print_decimal", 10u32), ("print_hex", 16)] {
        let (mut next, mut digit, ..) = labels(c);
        c.name_own(name)?;
        let end = c.offset(variable::DIGITS_END);
        c.mov(edi, end - 1)?;
        c.mov(byte_ptr(edi), 0u32)?;
        c.mov(ecx, base)?;
        c.set_label(&mut next)?;
        c.xor(edx, edx)?;
        c.div(ecx)?;
        c.add(dl, u32::from(b'0'))?;
        c.cmp(dl, u32::from(b'9') + 1)?;
        c.jb(digit)?;
        c.add(dl, u32::from(b'a' - b'0' - 10))?;
        c.set_label(&mut digit)?;
        c.dec(edi)?;
        c.mov(byte_ptr(edi), dl)?;
        c.test(eax, eax)?;
        c.jne(next)?;
        c.mov(esi, edi)?;
        c.call_own("print")?;
        c.ret()?;
    }
    Ok(())
}

fn end_section(c: &mut Code<'_>) -> Done {
    let (mut passed, ..) = labels(c);
    c.name_own("end_section")?;
    let checks = c.dword(variable::CHECKS);
    c.mov(eax, checks)?;
    c.call_own("print_decimal")?;
    print(c, " checked  ")?;
    let sections = c.dword(variable::SECTIONS);
    c.inc(sections)?;
    let text = c.text("PASS\n");
    c.mov(esi, text)?;
    let fails = c.dword(variable::FAILS);
    c.cmp(fails, 0)?;
    c.je(passed)?;
    let failed_sections = c.dword(variable::FAILED_SECTIONS);
    c.inc(failed_sections)?;
    print(c, "FAIL ")?;
    let fails = c.dword(variable::FAILS);
    c.mov(eax, fails)?;
    c.call_own("print_decimal")?;
    let text = c.text("\n");
    c.mov(esi, text)?;
    c.set_label(&mut passed)?;
    c.call_own("print")?;
    Ok(c.ret()?)
}

/// `finish` prints the result and powers off.
fn result(c: &mut Code<'_>) -> Done {
    let (mut all, mut off, mut stop, _) = labels(c);
    c.name_own("finish")?;
    let failed = c.dword(variable::FAILED_SECTIONS);
    c.cmp(failed, 0)?;
    c.je(all)?;
    print(c, "Result: FAIL, ")?;
    let failed = c.dword(variable::FAILED_SECTIONS);
    c.mov(eax, failed)?;
    c.call_own("print_decimal")?;
    print(c, " failed of ")?;
    c.jmp(off)?;
    c.set_label(&mut all)?;
    print(c, "Result: PASS, all of ")?;
    c.set_label(&mut off)?;
    let sections = c.dword(variable::SECTIONS);
    c.mov(eax, sections)?;
    c.call_own("print_decimal")?;
    print(c, " sections\n")?;
    c.name_own("power_off")?;
    c.mov(dx, PM1A_CONTROL)?;
    c.mov(ax, POWER_OFF)?;
    c.out(dx, ax)?;
    c.cli()?;
    c.set_label(&mut stop)?;
    c.hlt()?;
    Ok(c.jmp(stop)?)
}

/// Prints `text`.
pub fn print(c: &mut Code<'_>, text: &str) -> Done {
    let at = c.text(text);
    c.mov(esi, at)?;
    c.call_own("print")
}

/// Clears the variables and sets COM1 to 115200 baud, 8 bits, no parity. For real mode, first of all.
pub fn initialise(c: &mut Code<'_>) -> Done {
    let base = c.offset(variable::BASE);
    c.mov(edi, base)?;
    c.mov(ecx, 0x1000u32 / 4)?;
    c.xor(eax, eax)?;
    c.cld()?;
    c.rep().stosd()?;
    let expect = c.dword(variable::EXPECT);
    c.mov(expect, variable::NOTHING_EXPECTED)?;
    // Interrupts off; divisor 1; 8N1; FIFOs on and empty; DTR, RTS.
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        c.mov(dx, COM1 + register)?;
        c.mov(al, value)?;
        c.out(dx, al)?;
    }
    Ok(())
}

/// One line of the report: a title, the checks that `body` makes, and their verdict.
pub fn section(c: &mut Code<'_>, title: &str, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    let (checks, fails) = (c.dword(variable::CHECKS), c.dword(variable::FAILS));
    c.mov(checks, 0)?;
    c.mov(fails, 0)?;
    body(c)?;
    print(c, &format!("{title:COLUMN$}"))?;
    c.call_own("end_section")
}

/// Counts a check: it has passed if ZF is set.
pub fn check_zero_flag(c: &mut Code<'_>) -> Done {
    let (mut passed, ..) = labels(c);
    c.je(passed)?;
    let fails = c.dword(variable::FAILS);
    c.inc(fails)?;
    c.set_label(&mut passed)?;
    let checks = c.dword(variable::CHECKS);
    Ok(c.inc(checks)?)
}

/// Checks that `register` holds `value`.
pub fn check(c: &mut Code<'_>, register: AsmRegister32, value: u32) -> Done {
    c.cmp(register, value)?;
    check_zero_flag(c)
}

/// Checks that the dword at linear address `at` holds `value`.
pub fn check_memory(c: &mut Code<'_>, at: u32, value: u32) -> Done {
    let at = c.dword(at);
    c.cmp(at, value)?;
    check_zero_flag(c)
}

/// Checks that `body` raises `vector` (32- and 64-bit code). Execution goes on after it.
pub fn check_raises(c: &mut Code<'_>, vector: u8, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    let after = c.fresh_name();
    let at = c.address(&after);
    let (resume, expect) = (c.dword(variable::RESUME), c.dword(variable::EXPECT));
    c.mov(resume, at)?;
    c.mov(expect, u32::from(vector))?;
    body(c)?;
    c.name(&after)?;
    c.nop()?;
    check_memory(c, variable::EXPECT, variable::NOTHING_EXPECTED)?;
    let expect = c.dword(variable::EXPECT);
    Ok(c.mov(expect, variable::NOTHING_EXPECTED)?)
}

/// Checks that `body` raises #PF with `code` at `address`.
pub fn check_page_fault(c: &mut Code<'_>, code: u32, address: u32, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    check_raises(c, umbra_arch::fault::vector::PF, body)?;
    check_memory(c, variable::FAULT_CODE, code)?;
    check_memory(c, variable::FAULT_ADDRESS, address)
}

/// Bytes of a stack slot.
fn slot(c: &Code<'_>) -> u32 {
    c.bits() / 8
}

/// A whole slot is pushed: in 64-bit code RAX.
fn push_eax(c: &mut Code<'_>) -> Done {
    if c.bits() == 64 {
        c.push(rax)?;
    } else {
        c.push(eax)?;
    }
    Ok(())
}

fn pop_eax(c: &mut Code<'_>) -> Done {
    if c.bits() == 64 {
        c.pop(rax)?;
    } else {
        c.pop(eax)?;
    }
    Ok(())
}

/// Whether the exception pushes an error code ("Error Code").
fn has_error_code(vector: u32) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

fn exceptions(c: &mut Code<'_>) -> Done {
    for vector in 0..32u32 {
        c.name_own(&format!("vector {vector}"))?;
        if !has_error_code(vector) {
            c.push(0)?;
        }
        c.push(vector as i32)?;
        c.jump(&format!("exception.{}", c.bits()))?;
    }
    c.name_own(&format!("vector {COUNTED_INTERRUPT}"))?;
    let interrupts = c.dword(variable::INTERRUPTS);
    c.inc(interrupts)?;
    interrupt_return(c)?;
    exception(c)
}

fn interrupt_return(c: &mut Code<'_>) -> Done {
    if c.bits() == 64 {
        c.iretq()?;
    } else {
        c.iretd()?;
    }
    Ok(())
}

/// On the stack, from the top: EAX, vector, error code, instruction pointer.
fn exception(c: &mut Code<'_>) -> Done {
    let (mut unmapped, mut expected, ..) = labels(c);
    let slot = slot(c);
    c.name_own("exception")?;
    push_eax(c)?;
    c.mov(eax, dword_ptr(esp + 2 * slot))?;
    let code = c.dword(variable::FAULT_CODE);
    c.mov(code, eax)?;
    if c.bits() == 64 {
        c.mov(rax, cr2)?;
    } else {
        c.mov(eax, cr2)?;
    }
    let address = c.dword(variable::FAULT_ADDRESS);
    c.mov(address, eax)?;
    c.mov(eax, dword_ptr(esp + slot))?;
    let expect = c.dword(variable::EXPECT);
    c.cmp(eax, expect)?;
    c.je(expected)?;
    let map_at = c.dword(variable::MAP_AT);
    c.cmp(eax, 14)?;
    c.jne(unmapped)?;
    c.cmp(map_at, 0)?;
    c.je(unmapped)?;
    demand_mapping(c)?;
    c.set_label(&mut expected)?;
    let expect = c.dword(variable::EXPECT);
    c.mov(expect, variable::NOTHING_EXPECTED)?;
    let resume = c.dword(variable::RESUME);
    c.mov(eax, resume)?;
    c.mov(dword_ptr(esp + 3 * slot), eax)?;
    pop_eax(c)?;
    c.add(esp, 2 * slot)?;
    interrupt_return(c)?;
    c.set_label(&mut unmapped)?;
    unexpected(c)
}

/// Writes the entry the ROM has prepared and lets the instruction run again.
fn demand_mapping(c: &mut Code<'_>) -> Done {
    let slot = slot(c);
    let (map_at, map_value, saved) =
        (c.dword(variable::MAP_AT), c.dword(variable::MAP_VALUE), c.dword(variable::SAVED));
    // 32 bits of EBX are enough: ROMs that prepare a mapping keep no more in it.
    c.mov(saved, ebx)?;
    c.mov(ebx, map_at)?;
    c.mov(eax, map_value)?;
    c.mov(dword_ptr(ebx), eax)?;
    c.mov(map_at, 0)?;
    c.mov(ebx, saved)?;
    pop_eax(c)?;
    c.add(esp, 2 * slot)?;
    interrupt_return(c)
}

fn unexpected(c: &mut Code<'_>) -> Done {
    let slot = slot(c);
    let fields = [("\nunexpected exception ", slot), (", code ", 2 * slot), (", at ", 3 * slot)];
    for (text, offset) in fields {
        print(c, text)?;
        c.mov(eax, dword_ptr(esp + offset))?;
        c.call_own("print_hex")?;
    }
    print(c, ", CR2 ")?;
    let address = c.dword(variable::FAULT_ADDRESS);
    c.mov(eax, address)?;
    c.call_own("print_hex")?;
    print(c, "\nResult: FAIL, stopped by an exception\n")?;
    c.jump(&format!("power_off.{}", c.bits()))
}

/// `idt.32` and `idt.64`, with their pseudo-descriptors `idtr.32` and `idtr.64`.
fn interrupt_table(l: &mut Linker, bits: u32) -> Done {
    let mut bytes = Vec::new();
    for vector in 0..VECTORS {
        let present = vector < 32 || vector == COUNTED_INTERRUPT;
        let target = if present { l.address(&format!("vector {vector}.{bits}")) } else { 0 };
        let selector = if bits == 64 { selector::CODE64 } else { selector::CODE32 };
        bytes.extend_from_slice(&interrupt_gate(target, selector, present).to_le_bytes());
        if bits == 64 {
            bytes.extend_from_slice(&[0; 8]);
        }
    }
    l.data(&format!("idt.{bits}"), &bytes)?;
    let base = l.address(&format!("idt.{bits}"));
    pseudo_descriptor(l, &format!("idtr.{bits}"), base, bytes.len())
}

fn interrupt_gate(offset: u32, selector: u16, present: bool) -> u64 {
    let attributes = u64::from(descriptor::system::INTERRUPT_GATE) | u64::from(present) << 7;
    u64::from(offset & 0xffff) | u64::from(selector) << 16 | attributes << 40 | u64::from(offset >> 16) << 48
}

fn global_table(l: &mut Linker) -> Done {
    let image = crate::LOAD.raw() as u32;
    let table = [
        0,
        descriptor::encode(0, u32::MAX, Attr(0xc09b)),
        descriptor::encode(0, u32::MAX, Attr(0xc093)),
        descriptor::encode(0, u32::MAX, Attr(0xa09b)),
        descriptor::encode(image, 0xffff, Attr(0x009b)),
        descriptor::encode(image, 0xffff, Attr(0x0093)),
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|d| d.to_le_bytes()).collect();
    l.data("gdt", &bytes)?;
    let base = l.address("gdt");
    pseudo_descriptor(l, "gdtr", base, bytes.len())
}

fn pseudo_descriptor(l: &mut Linker, name: &str, base: u32, size: usize) -> Done {
    let mut bytes = (size as u16 - 1).to_le_bytes().to_vec();
    bytes.extend_from_slice(&u64::from(base).to_le_bytes());
    l.data(name, &bytes)
}
