//! Known defects of backends: answers that are there but wrong. Each was reproduced against the manual's words
//! before it got its name, and only excuses differences that show exactly it.

use crate::Backend;

/// A wrong answer that a backend is known for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Defect {
    /// Its name in reports.
    pub name: &'static str,
    /// The backend that has it.
    pub backend: Backend,
    /// What it does, and what a processor does.
    pub what: &'static str,
}

/// No 32-bit paging.
pub const LEGACY_PAGING: Defect = Defect {
    name: "legacy-paging",
    backend: Backend::KvmPvm,
    what: "2-level and PAE paging don't exist: KVM_SET_SREGS drops CR0.PG without a word, MOV to CR0 is #GP",
};

/// IRET to an outer ring and segment registers.
pub const IRET_KEEPS_SEGMENTS: Defect = Defect {
    name: "iret-keeps-segments",
    backend: Backend::KvmPvm,
    what: "IRET to an outer ring leaves segment registers of inner rings alone; a processor loads null selectors",
};

/// RFLAGS.AC in exception delivery.
pub const EVENT_CLEARS_AC: Defect = Defect {
    name: "event-clears-ac",
    backend: Backend::KvmPvm,
    what: "an exception clears RFLAGS.AC in its handler, so that SMAP stops it from reading a user's page; \
           a processor leaves it alone",
};

/// Accessed bits of a read-modify-write that faults.
pub const MODIFY_SETS_ACCESSED: Defect = Defect {
    name: "modify-sets-accessed",
    backend: Backend::KvmPvm,
    what: "a read-modify-write is a read first, which sets accessed bits, before the write faults; \
           on a processor it is one write access",
};

/// CR4.PKE without the feature.
pub const PKE_WITHOUT_PKU: Defect = Defect {
    name: "pke-without-pku",
    backend: Backend::KvmPvm,
    what: "CR4.PKE can be set although the guest's CPUID offers no protection keys; it is reserved then",
};

/// Alignment checks in ring 3.
pub const ALIGNMENT_WITHOUT_AM: Defect = Defect {
    name: "alignment-without-am",
    backend: Backend::KvmPvm,
    what: "ring 3 runs with the host's CR0.AM: RFLAGS.AC alone makes misaligned accesses #AC there",
};

/// EFER.NXE and translations made under it.
pub const NXE_OFF_KEEPS_TRANSLATIONS: Defect = Defect {
    name: "nxe-off-keeps-translations",
    backend: Backend::KvmPvm,
    what: "after EFER.NXE is cleared and the page invalidated, a translation whose XD bit is reserved now is still used",
};

/// Pages of 1 GiB.
pub const GIB_PAGES_RESERVED: Defect = Defect {
    name: "gib-pages-reserved",
    backend: Backend::KvmPvm,
    what: "CPUID shows pages of 1 GiB (cpuid-shows-host), but PS in a PDPTE is a reserved bit",
};

/// CPUID and features that KVM doesn't list.
pub const CPUID_SHOWS_HOST: Defect = Defect {
    name: "cpuid-shows-host",
    backend: Backend::KvmPvm,
    what: "CPUID shows features of the host that KVM_GET_SUPPORTED_CPUID doesn't list and KVM_SET_CPUID2 didn't set; \
           engines compared with it are given them too",
};

/// HLT under single step.
pub const STEP_OVER_HLT: Defect = Defect {
    name: "step-over-hlt",
    backend: Backend::KvmPvm,
    what: "after a HLT was single-stepped, a later KVM_RUN reports a HLT that the guest didn't reach",
};

/// Stores across a page boundary.
pub const PARTIAL_WRITE: Defect = Defect {
    name: "partial-write",
    backend: Backend::KvmPvm,
    what: "a store into an absent page that starts on the page before leaves its first bytes there; \
           a processor writes nothing",
};

/// SYSRET.
pub const SYSRET_SHUTDOWN: Defect = Defect {
    name: "sysret-shutdown",
    backend: Backend::KvmPvm,
    what: "SYSRET to 64-bit code at selector 43h ends in a shutdown; a processor returns",
};

/// Ends of interrupts in KVM's own local APIC.
pub const APIC_ENDS_INTERRUPTS: Defect = Defect {
    name: "apic-ends-interrupts",
    backend: Backend::KvmPvm,
    what: "KVM's own local APIC ends each interrupt as it delivers it: no vector is in service in its handler, lower ones \
           get in, and the I/O APIC is told of the end (KVM_EXIT_IOAPIC_EOI) before the handler has quietened its device",
};

/// Interrupts of KVM's own local APIC in ring 0.
pub const APIC_DELIVERS_LATE: Defect = Defect {
    name: "apic-delivers-late",
    backend: Backend::KvmPvm,
    what: "ring-0 code goes on for hundreds of instructions with RFLAGS.IF set while an interrupt waits in KVM's own \
           local APIC",
};

/// What keeps a backend's local APIC from being used unless it is asked for.
pub fn of_split_irqchip(backend: Backend) -> Option<&'static Defect> {
    [&APIC_ENDS_INTERRUPTS].into_iter().find(|defect| defect.backend == backend)
}

/// All of them.
pub const DEFECTS: [Defect; 14] = [
    APIC_ENDS_INTERRUPTS,
    APIC_DELIVERS_LATE,
    LEGACY_PAGING,
    IRET_KEEPS_SEGMENTS,
    EVENT_CLEARS_AC,
    MODIFY_SETS_ACCESSED,
    PKE_WITHOUT_PKU,
    ALIGNMENT_WITHOUT_AM,
    NXE_OFF_KEEPS_TRANSLATIONS,
    GIB_PAGES_RESERVED,
    CPUID_SHOWS_HOST,
    STEP_OVER_HLT,
    PARTIAL_WRITE,
    SYSRET_SHUTDOWN,
];
