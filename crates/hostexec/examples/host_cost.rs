//! Prints what one execution costs: `cargo run --release -p umbra-hostexec --example host_cost`.

#[path = "../tests/rig/mod.rs"]
mod rig;

use iced_x86::code_asm::*;
use rig::{Machine, Random, assembled};
use std::time::Instant;
use umbra_hostexec::HostExec;

fn main() {
    let mut host = HostExec::new().unwrap();
    let mut m = Machine::random(&mut Random(1));
    m.fp.xmm = [[1.5f64.to_bits(); 2]; 16];
    for i in [
        assembled(|x| x.pxor(xmm3, xmm7).unwrap()),
        assembled(|x| x.movups(xmm3, ptr(rax)).unwrap()),
        assembled(|x| x.mulsd(xmm3, xmm7).unwrap()),
        assembled(|x| x.ucomisd(xmm3, xmm7).unwrap()),
        assembled(|x| x.vpaddb(ymm3, ymm3, ymm7).unwrap()),
        assembled(|x| x.movq(rax, xmm3).unwrap()),
        assembled(|x| x.paddb(mm3, mm4).unwrap()),
        assembled(|x| x.fmul_2(st0, st1).unwrap()),
    ] {
        let prepared = host.prepare(&i).unwrap();
        let start = Instant::now();
        const N: u32 = 3_000_000;
        for _ in 0..N {
            let _ = m.run(&mut host, &prepared);
        }
        println!("{:?}: {:.1} ns", i.code(), start.elapsed().as_nanos() as f64 / f64::from(N));
    }
}
