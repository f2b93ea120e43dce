//! The property `control_regs`, in a process of its own: where KVM is software (pvm), a process that has run sequences
//! under it can lose INT3s, which engine `host` needs.

mod findings;

use findings::replay;
use proptest::collection::vec;
use proptest::prelude::*;
use umbra_oracle::compared::control_regs;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn engines_agree_on_any_sequence(data in vec(any::<u8>(), 9..400)) {
        control_regs(&data);
    }
}

#[test]
fn findings_stay_fixed() {
    replay("control_regs", control_regs);
}
