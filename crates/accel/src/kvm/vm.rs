//! A virtual machine of KVM's: the guest's memory in its slots.
#![allow(unsafe_code, reason = "memory slots are host addresses")]

use super::error::{KvmError, failed};
use super::irqchip::Irqchip;
use crate::Backend;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::sync::Arc;
use umbra_arch::{GpaPage, PAGE_SIZE};
use umbra_memory::{GuestMemory, HostRegion};

/// Three pages that VMX needs for real mode, below the firmware; with the identity map's page before them.
const TSS_ADDRESS: usize = 0xfeff_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;

/// A virtual machine that maps a [`GuestMemory`].
pub struct Vm {
    pub(super) fd: VmFd,
    pub(super) kvm: Kvm,
    memory: Arc<GuestMemory>,
    slots: Vec<HostRegion>,
    generation: u64,
    backend: Backend,
}

impl Vm {
    /// Opens /dev/kvm and maps `memory`; a CPU of it will have its local APIC where `irqchip` says.
    ///
    /// # Errors
    /// [`KvmError`] when there is no usable KVM.
    pub fn new(memory: Arc<GuestMemory>, irqchip: Irqchip) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
        let needed = [(Cap::ImmediateExit, "immediate_exit"), (Cap::VcpuEvents, "vCPU events"), (Cap::Xcrs, "XCRs")];
        if let Some((_, name)) = needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Missing(name));
        }
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        irqchip.make(&kvm, &fd)?;
        let mut vm = Self { fd, kvm, memory, slots: Vec::new(), generation: 0, backend: Backend::of_kvm() };
        vm.map()?;
        Ok(vm)
    }

    /// What executes the guest.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The memory that is mapped.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Follows changes of the memory map.
    ///
    /// # Errors
    /// [`KvmError`] when the kernel refuses a slot.
    pub fn follow_map(&mut self) -> Result<(), KvmError> {
        if self.generation == self.memory.generation() { Ok(()) } else { self.remap() }
    }

    /// Maps everything anew, which drops all that KVM derived from the guest's page tables. Needed whenever
    /// somebody but the guest and KVM has written to tables: KVM doesn't see such writes.
    ///
    /// # Errors
    /// [`KvmError`] when the kernel refuses a slot.
    pub fn remap(&mut self) -> Result<(), KvmError> {
        self.take_written()?;
        for (slot, region) in std::mem::take(&mut self.slots).iter().enumerate() {
            self.set_slot(slot, &HostRegion { bytes: 0, ..*region })?;
        }
        self.map()
    }

    fn map(&mut self) -> Result<(), KvmError> {
        self.generation = self.memory.generation();
        for (slot, region) in self.memory.host_regions().into_iter().enumerate() {
            self.set_slot(slot, &region)?;
            self.slots.push(region);
        }
        Ok(())
    }

    fn set_slot(&self, slot: usize, region: &HostRegion) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if region.rom { KVM_MEM_READONLY } else { KVM_MEM_LOG_DIRTY_PAGES },
            guest_phys_addr: region.gpa.raw(),
            memory_size: region.bytes,
            userspace_addr: region.host,
        };
        // SAFETY: the addresses are those of the mapping that `memory` owns; the `Arc` keeps it alive longer
        // than the VM. Guest RAM is only ever accessed by volatile or atomic operations on raw bytes.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Pages that the guest has written since the last call, in order of their addresses. The memory's other
    /// users are told.
    ///
    /// # Errors
    /// [`KvmError`] when the kernel keeps no log.
    pub fn take_written(&self) -> Result<Vec<GpaPage>, KvmError> {
        let mut pages = Vec::new();
        for (slot, region) in self.slots.iter().enumerate().filter(|(_, region)| !region.rom) {
            let log = self.fd.get_dirty_log(slot as u32, region.bytes as usize).map_err(failed("KVM_GET_DIRTY_LOG"))?;
            let first = region.gpa.raw() / PAGE_SIZE;
            for (index, word) in log.iter().enumerate().filter(|(_, word)| **word != 0) {
                let set = (0..64).filter(|bit| word >> bit & 1 != 0);
                pages.extend(set.map(|bit| GpaPage::new(first + 64 * index as u64 + bit)));
            }
        }
        pages.iter().for_each(|page| self.memory.page_written_outside(*page));
        Ok(pages)
    }
}
