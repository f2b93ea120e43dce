//! A short run of each property on random input, and every saved finding. `control_regs` is in `sequences`.

mod findings;

use findings::replay;
use proptest::collection::vec;
use proptest::prelude::*;
use umbra_oracle::boot_images::boot_images;
use umbra_oracle::compared::{interp_vs_host, jit_vs_interp, page_walk};
use umbra_oracle::decode_execute::decode_execute;
use umbra_oracle::device_io::{device_io, snapshot};
use umbra_oracle::hostile_guest::hostile_guest;
use umbra_oracle::self_modifying::self_modifying;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes_execute(data in vec(any::<u8>(), 2..600)) {
        decode_execute(&data);
    }

    #[test]
    fn quiet_bytes_execute(mode in 0u8..8, code in vec(any::<u8>(), 1..600)) {
        decode_execute(&[&[mode, 0], &code[..]].concat());
    }

    #[test]
    fn any_bytes_are_no_kernel(data in vec(any::<u8>(), 1..4096)) {
        boot_images(&data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn guests_write_all_over_tables_and_devices(data in vec(any::<u8>(), 9..800)) {
        hostile_guest(&data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn engines_agree_on_any_choice(data in vec(any::<u8>(), 9..400)) {
        page_walk(&data);
        interp_vs_host(&data);
        jit_vs_interp(&data);
    }

    #[test]
    fn code_that_rewrites_itself_is_translated_right(data in vec(any::<u8>(), 9..300)) {
        self_modifying(&data);
    }

    #[test]
    fn devices_take_anything_and_are_saved_whole(data in vec(any::<u8>(), 9..600)) {
        device_io(&data);
        snapshot(&data);
    }
}

#[test]
fn findings_stay_fixed() {
    replay("decode_execute", decode_execute);
    replay("boot_images", boot_images);
    replay("hostile_guest", hostile_guest);
    replay("page_walk", page_walk);
    replay("interp_vs_host", interp_vs_host);
    replay("jit_vs_interp", jit_vs_interp);
    replay("self_modifying", self_modifying);
    replay("device_io", device_io);
    replay("snapshot", snapshot);
}
