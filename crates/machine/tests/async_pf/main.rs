//! RAM that arrives on demand, and KVM's asynchronous page faults, with a guest on the real engine.

mod guest;

use guest::{BAD, COUNTS, END, FIRST, FUNCTION, GOOD, PAGES, Plan};
use std::io;
use std::sync::Arc;
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::{Gpa, GpaPage, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_machine::{End, Host, Machine, MachineConfig, PageStats, guest_memory};
use umbra_memory::PageSource;

const RAM: u64 = 16 << 20;
const LATENCY: u64 = 20_000;
/// Pages of the guest that are absent when it comes to them: the row, the one behind its end, the function's.
const TOUCHED: u64 = PAGES as u64 + 2;

/// Every word says where it is; one page holds code; one can't be read.
struct Pattern {
    broken: Option<u64>,
}

fn word_at(gpa: u64) -> u32 {
    (gpa as u32).wrapping_mul(0x9e37_79b1)
}

impl PageSource for Pattern {
    fn bytes(&self) -> u64 {
        RAM
    }
    fn read_page(&self, page: GpaPage, into: &mut [u8; 4096]) -> io::Result<()> {
        let base = page.base().raw();
        if self.broken == Some(base) {
            return Err(io::Error::other("no such block"));
        }
        for (n, word) in into.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&word_at(base + 4 * n as u64).to_le_bytes());
        }
        if base == u64::from(FUNCTION) {
            into.fill(0xc3);
        }
        Ok(())
    }
}

struct Deaf;

impl Host for Deaf {
    fn serial(&mut self, _: &[u8]) {}
}

fn machine_with(source: Option<Pattern>, latency: u64) -> Machine<Interpreter> {
    let mut profile = CpuidProfile::named("umbra-v2").unwrap();
    profile.features.insert(Feature::KvmAsyncPfInt);
    let memory = guest_memory(RAM).unwrap();
    if let Some(source) = source {
        memory.set_page_source(Box::new(source)).unwrap();
    }
    let engine = Interpreter::new(Arc::clone(&memory), &profile, 0, &EngineOptions::default()).unwrap();
    let mut machine = Machine::new(memory, &MachineConfig { profile, rtc_start: 0 }, vec![engine]).unwrap();
    machine.pc_mut().set_page_latency(latency);
    machine
}

fn fresh() -> Machine<Interpreter> {
    machine_with(Some(Pattern { broken: None }), LATENCY)
}

fn booted(plan: &Plan) -> Machine<Interpreter> {
    let mut machine = fresh();
    machine.boot(&guest::boot(plan).unwrap());
    machine
}

/// What the guest counted: not present, ready, wake-all, timer, sum.
fn counts(machine: &Machine<Interpreter>) -> [u32; 5] {
    let mut raw = [0; 20];
    machine.memory().read(Gpa::new(COUNTS.into()), &mut raw);
    std::array::from_fn(|n| u32::from_le_bytes([raw[4 * n], raw[4 * n + 1], raw[4 * n + 2], raw[4 * n + 3]]))
}

fn expected_row() -> u32 {
    (0..PAGES).fold(0u32, |sum, n| sum.wrapping_add(word_at(u64::from(FIRST + n * 4096))))
}

fn expected_sum() -> u32 {
    let (low, high) = (word_at(u64::from(END) - 4) >> 16, word_at(END.into()) << 16);
    expected_row().wrapping_add(low | high)
}

fn run(plan: &Plan) -> (Machine<Interpreter>, PageStats) {
    let mut machine = booted(plan);
    let before = machine.page_stats().unwrap();
    assert_eq!(before.events + before.waits, 0);
    assert_eq!(machine.run(&mut Deaf, Some(VirtualTime(2_000_000_000))), End::DebugExit(GOOD), "{plan:?}");
    let after = machine.page_stats().unwrap();
    assert_eq!(counts(&machine)[4], expected_sum(), "{plan:?}: every page held what the source has");
    // The pages it touched have come; the others have not.
    for page in 0..RAM >> 12 {
        let (gpa, page) = (page << 12, GpaPage::new(page));
        let touched = (u64::from(FIRST)..=u64::from(END)).contains(&gpa) || gpa == u64::from(FUNCTION);
        assert!(!touched || !machine.memory().is_absent(page), "{gpa:#x}");
        assert!(touched || gpa < 0x10_0000 || machine.memory().is_absent(page), "{gpa:#x}");
    }
    (machine, after)
}

#[test]
fn more_than_a_thousand_events_are_delivered_and_each_is_ready_once() {
    let (machine, stats) = run(&Plan::TOLD);
    let [missing, ready, all, ..] = counts(&machine);
    assert!(missing > 1000);
    assert_eq!((u64::from(missing), u64::from(ready), all), (TOUCHED, TOUCHED, 1));
    assert_eq!(stats.events, TOUCHED);
    assert_eq!(stats.waits, 0);
    assert!(machine.now().0 >= TOUCHED * LATENCY, "a page at a time");
}

/// Scenario 79 of the MMU's list: no #PF where the guest can't take it or doesn't want it.
#[test]
fn scenario_79_without_paging_or_at_cpl_0_the_cpu_waits() {
    let not_always = Plan { control: 0b1001, ..Plan::TOLD };
    let no_interrupt = Plan { control: 0b0011, ..Plan::TOLD };
    let no_paging = Plan { paging: false, ..Plan::TOLD };
    let masked = Plan { interrupts: false, ..Plan::TOLD };
    for plan in [not_always, no_interrupt, no_paging, masked] {
        let (machine, stats) = run(&plan);
        assert_eq!((counts(&machine)[0], counts(&machine)[1], stats.events), (0, 0, 0), "{plan:?}");
        assert_eq!(stats.waits, TOUCHED, "{plan:?}");
        assert!(machine.now().0 >= TOUCHED * LATENCY, "{plan:?}");
    }
}

/// Scenario 80: paging goes off and on while a page is on its way, and arrives before or after.
#[test]
fn scenario_80_events_survive_an_excursion_without_paging() {
    for off_for in [1, LATENCY as u32 / 2, LATENCY as u32 * 3] {
        let (machine, stats) = run(&Plan { off_for, ..Plan::TOLD });
        let [missing, ready, all, ..] = counts(&machine);
        assert_eq!((u64::from(missing), u64::from(ready), all), (TOUCHED, TOUCHED, 1), "{off_for}");
        assert_eq!((stats.events, stats.waits), (TOUCHED, 0), "{off_for}");
    }
}

#[test]
fn a_waiting_cpu_takes_interrupts() {
    let period = 7_000;
    let (machine, stats) = run(&Plan { control: 0, timer: period, ..Plan::TOLD });
    assert_eq!(stats.events, 0);
    let waited = TOUCHED * LATENCY / u64::from(period);
    let taken = u64::from(counts(&machine)[3]);
    assert!(taken + 2 >= waited && taken * u64::from(period) <= machine.now().0, "{taken} of {waited}");
}

#[test]
fn pages_that_take_no_time_are_no_event() {
    let mut machine = machine_with(Some(Pattern { broken: None }), 0);
    machine.boot(&guest::boot(&Plan::TOLD).unwrap());
    assert_eq!(machine.run(&mut Deaf, None), End::DebugExit(GOOD));
    let stats = machine.page_stats().unwrap();
    assert_eq!((stats.events, stats.waits, counts(&machine)[0]), (0, 0, 0));
    assert_eq!(counts(&machine)[4], expected_sum());
}

#[test]
fn an_unreadable_page_ends_the_run() {
    let broken = u64::from(FIRST) + 5 * 4096;
    let mut machine = machine_with(Some(Pattern { broken: Some(broken) }), LATENCY);
    machine.boot(&guest::boot(&Plan::TOLD).unwrap());
    match machine.run(&mut Deaf, None) {
        End::MemoryFile(failure) => {
            assert_eq!(failure.gpa, Gpa::new(broken));
            assert!(failure.to_string().contains("no such block"));
        }
        end => panic!("{end:?}"),
    }
    assert_ne!(counts(&machine)[4], BAD);
}

/// The same guest again and again finds the pages that it touched last sent away.
fn crowded() -> Machine<Interpreter> {
    let mut machine = fresh();
    machine.pc_mut().set_resident_pages(Some(256));
    machine
}

#[test]
fn pages_sent_away_keep_their_contents_and_arrive_again() {
    let rounds = Plan { rounds: 3, ..Plan::TOLD };
    let mut machine = crowded();
    machine.boot(&guest::boot(&rounds).unwrap());
    assert_eq!(machine.run(&mut Deaf, None), End::DebugExit(GOOD));
    let stats = machine.page_stats().unwrap();
    let [missing, ready, ..] = counts(&machine);
    assert_eq!((u64::from(missing), missing), (stats.events, ready));
    assert!(stats.events > 3 * (u64::from(PAGES) - 256), "{stats:?}");
    assert!(stats.swapped > 2 * u64::from(PAGES) && stats.loaded < 2 * u64::from(PAGES), "{stats:?}");
    assert!(machine.memory().resident_pages() <= 256 + 64, "{stats:?}");
    assert_eq!(machine.memory().swapped_pages().len() as u64 + machine.memory().resident_pages(), {
        let covered = (RAM >> 12) - 32;
        covered - (0..RAM >> 12).filter(|&page| machine.memory().is_absent(GpaPage::new(page))).count() as u64
    });
    // The sum of three rounds, in which the guest found what it had written.
    assert_eq!(counts(&machine)[4], expected_sum().wrapping_add(expected_row().wrapping_mul(2)));
    for n in 0..PAGES {
        let mut word = [0; 4];
        machine.memory().read(Gpa::new(u64::from(FIRST + n * 4096 + 8)), &mut word);
        assert_eq!(u32::from_le_bytes(word), FIRST + n * 4096);
    }
}

#[test]
fn a_save_knows_which_pages_were_sent_away() {
    let rounds = Plan { rounds: 2, ..Plan::TOLD };
    let booted = || {
        let mut machine = crowded();
        machine.boot(&guest::boot(&rounds).unwrap());
        machine
    };
    let whole = finish(&mut booted());
    assert_eq!(finish(&mut booted()), whole, "two runs");
    for moment in (5_000_000..whole.1.0).step_by(9_123_457) {
        let mut machine = booted();
        assert_eq!(machine.run(&mut Deaf, Some(VirtualTime(moment))), End::Limit, "{moment}");
        let saved = machine.save().unwrap();
        assert_eq!(finish(&mut machine), whole, "stopping at {moment} changes nothing");
        for mut other in [crowded(), machine] {
            other.restore(&saved).unwrap();
            assert_eq!(other.save().unwrap(), saved, "{moment}: saving again gives the same bytes");
            assert_eq!(finish(&mut other), whole, "restored at {moment}");
        }
    }
}

/// Everything one can see of a machine at its end.
fn finish(machine: &mut Machine<Interpreter>) -> (End, VirtualTime, u64, umbra_arch::CpuState, Vec<u8>) {
    let end = machine.run(&mut Deaf, None);
    (end, machine.now(), machine.retired(), machine.vcpu(0).unwrap().state(), machine.save().unwrap())
}

#[test]
fn runs_are_equal_and_so_are_continued_and_restored_ones() {
    for plan in [Plan::TOLD, Plan { control: 0, timer: 7_000, ..Plan::TOLD }] {
        let whole = finish(&mut booted(&plan));
        assert_eq!(finish(&mut booted(&plan)), whole, "two runs");
        for moment in (1_000..whole.1.0).step_by(5_123_457).chain([30_000, 50_001]) {
            let mut machine = booted(&plan);
            assert_eq!(machine.run(&mut Deaf, Some(VirtualTime(moment))), End::Limit, "{moment}");
            let saved = machine.save().unwrap();
            assert_eq!(finish(&mut machine), whole, "stopping at {moment} changes nothing");
            // Into a fresh machine, and into one that has loaded more since.
            for mut other in [fresh(), machine] {
                other.restore(&saved).unwrap();
                assert_eq!(other.save().unwrap(), saved, "{moment}: saving again gives the same bytes");
                assert_eq!(finish(&mut other), whole, "restored at {moment}");
            }
        }
    }
}

#[test]
fn a_save_of_another_kind_of_memory_is_refused() {
    let saved = booted(&Plan::TOLD).save().unwrap();
    let mut plain = machine_with(None, LATENCY);
    assert!(plain.restore(&saved).unwrap_err().to_string().contains("memory file"));
    let mut slower = machine_with(Some(Pattern { broken: None }), LATENCY + 1);
    assert!(slower.restore(&saved).unwrap_err().to_string().contains("ns a page"));
}
