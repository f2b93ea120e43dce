//! Shadow paging with role-keyed roots that role changes never throw away.
#![forbid(unsafe_code)]
