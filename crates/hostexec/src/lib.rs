//! Runs one guest data instruction on the host CPU, state in and out.
