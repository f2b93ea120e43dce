//! Known defects of backends: answers that are there but wrong. Each was reproduced.
