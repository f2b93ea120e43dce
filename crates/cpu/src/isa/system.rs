//! Identification, time, MSRs, halting, random numbers, protection keys.

use super::Row;
use crate::by_wide;
use crate::core::Core;
use crate::op::{Flow, Op};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::cpuid::{CpuidDynamic, Feature};
use umbra_arch::state::{Activity, reg};
use umbra_arch::{Bus, Fault};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Cpuid, "CPUID-CPU Identification", |_| Some(cpuid)).ends(),
    Row::new(M::Rdtsc, "RDTSC-Read Time-Stamp Counter", |_| Some(rdtsc)).needs(Feature::Tsc),
    Row::new(M::Rdtscp, "RDTSCP-Read Time-Stamp Counter and Processor ID", |_| Some(rdtscp)).needs(Feature::Rdtscp),
    Row::new(M::Rdpid, "RDPID-Read Processor ID", |_| Some(rdpid)).needs(Feature::Rdpid),
    Row::new(M::Rdpmc, "RDPMC-Read Performance-Monitoring Counters", |_| Some(|c, _, _| c.raise(Fault::GP0))),
    Row::new(M::Rdmsr, "RDMSR-Read From Model Specific Register", |_| Some(rdmsr)).needs(Feature::Msr).ends(),
    Row::new(M::Wrmsr, "WRMSR-Write to Model Specific Register", |_| Some(wrmsr)).needs(Feature::Msr).ends(),
    Row::new(M::Hlt, "HLT-Halt", |_| {
        Some(|c, _, _| {
            c.need_ring0()?;
            c.halt(Activity::Halted);
            Ok(())
        })
    })
    .ends(),
    Row::new(M::Rdrand, "RDRAND-Read Random Number", |f| by_wide!(f.bytes, W => random::<W>)).needs(Feature::Rdrand),
    Row::new(M::Rdseed, "RDSEED-Read Random SEED", |f| by_wide!(f.bytes, W => random::<W>)).needs(Feature::Rdseed),
    Row::new(M::Rdpkru, "RDPKRU-Read Protection Key Rights for User Pages", |_| Some(rdpkru)).needs(Feature::Pku),
    Row::new(M::Wrpkru, "WRPKRU-Write Data to User Page Key Register", |_| Some(wrpkru)).needs(Feature::Pku).ends(),
    Row::new(M::Wbinvd, "WBINVD-Write Back and Invalidate Cache", |_| Some(|c, _, _| c.need_ring0())).ends(),
    Row::new(M::Invd, "INVD-Invalidate Internal Caches", |_| Some(|c, _, _| c.need_ring0())).ends(),
];

fn cpuid(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let apic_base = bus.apic_msr_read(c.now(op.prefix), umbra_arch::msr::IA32_APIC_BASE);
    let apic_enabled = apic_base.is_ok_and(|reply| reply.value & 1 << 11 != 0);
    let now = CpuidDynamic {
        cr4: c.s.cr4,
        xcr0: c.s.xcr0,
        xss: c.s.msr.xss,
        misc_enable: c.s.msr.misc_enable,
        apic_id: c.apic_id,
        apic_enabled,
        cpus: c.cpus,
    };
    let [eax, ebx, ecx, edx] = c.profile.cpuid(c.gpr[reg::RAX] as u32, c.gpr[reg::RCX] as u32, now);
    c.gpr[reg::RAX] = eax.into();
    c.gpr[reg::RBX] = ebx.into();
    c.gpr[reg::RCX] = ecx.into();
    c.gpr[reg::RDX] = edx.into();
    Ok(())
}

fn split(c: &mut Core, value: u64) {
    c.gpr[reg::RAX] = value & 0xffff_ffff;
    c.gpr[reg::RDX] = value >> 32;
}

fn rdtsc(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    if c.s.cr4.tsd() && c.s.cpl != 0 {
        return c.raise(Fault::GP0);
    }
    let tsc = c.read_tsc(bus, op);
    split(c, tsc);
    Ok(())
}

fn rdtscp(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    rdtsc(c, bus, op)?;
    c.gpr[reg::RCX] = c.s.msr.tsc_aux & 0xffff_ffff;
    Ok(())
}

fn rdpid(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.s.msr.tsc_aux & 0xffff_ffff;
    c.set_reg::<u64>(op.dst, value);
    Ok(())
}

fn rdmsr(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_ring0()?;
    let value = c.read_msr(bus, op, c.gpr[reg::RCX] as u32)?;
    split(c, value);
    Ok(())
}

fn wrmsr(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_ring0()?;
    let value = c.gpr[reg::RAX] & 0xffff_ffff | c.gpr[reg::RDX] << 32;
    c.write_msr(bus, op, c.gpr[reg::RCX] as u32, value)
}

fn random<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.next_random();
    c.set_reg::<W>(op.dst, value);
    c.flags = crate::flags::Flags::from_rflags(umbra_arch::rflags::CF);
    Ok(())
}

fn need_pke(c: &mut Core) -> Flow {
    if !c.s.cr4.pke() {
        return c.raise(Fault::UNDEFINED);
    }
    if c.gpr[reg::RCX] as u32 != 0 {
        return c.raise(Fault::GP0);
    }
    Ok(())
}

fn rdpkru(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    need_pke(c)?;
    c.gpr[reg::RAX] = c.s.pkru.into();
    c.gpr[reg::RDX] = 0;
    Ok(())
}

fn wrpkru(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    need_pke(c)?;
    if c.gpr[reg::RDX] as u32 != 0 {
        return c.raise(Fault::GP0);
    }
    c.s.pkru = c.gpr[reg::RAX] as u32;
    c.mmu.set_pkru(c.s.pkru);
    Ok(())
}
