//! Requests that kvm-ioctls has no functions for.
#![allow(unsafe_code, reason = "three ioctls")]

use super::error::KvmError;
use kvm_bindings::{kvm_interrupt, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use std::os::fd::AsRawFd;

/// KVM_CAP_SREGS2.
pub(super) const CAP_SREGS2: u64 = 200;

const KVMIO: u64 = 0xae;
const READ: u64 = 2;
const WRITE: u64 = 1;

/// The kernel's encoding of an ioctl on a structure of `size` bytes.
const fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

const GET_SREGS2: u64 = request(READ, 0xcc, size_of::<kvm_sregs2>());
const SET_SREGS2: u64 = request(WRITE, 0xcd, size_of::<kvm_sregs2>());

const INTERRUPT: u64 = request(WRITE, 0x86, size_of::<kvm_interrupt>());

pub(super) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, KvmError> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the descriptor is a vCPU's, and the kernel writes exactly the structure that the request's size names.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_SREGS2, &raw mut sregs) };
    checked(result, "KVM_GET_SREGS2").map(|()| sregs)
}

pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), KvmError> {
    // SAFETY: the descriptor is a vCPU's, and the kernel only reads the structure.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), SET_SREGS2, std::ptr::from_ref(sregs)) };
    checked(result, "KVM_SET_SREGS2")
}

/// Queues an interrupt of controllers outside the kernel; false if another one still waits.
pub(super) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<bool, KvmError> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: as in `set_sregs2`.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), INTERRUPT, &raw const interrupt) };
    match checked(result, "KVM_INTERRUPT") {
        Err(KvmError::Request { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        result => result.map(|()| true),
    }
}

fn checked(result: libc::c_int, request: &'static str) -> Result<(), KvmError> {
    match result {
        0.. => Ok(()),
        _ => Err(KvmError::Request { request, source: std::io::Error::last_os_error() }),
    }
}
