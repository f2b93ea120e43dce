//! Sizes and durations as people write them.

use std::time::Duration;

/// Reads `512M`, `1G`, `65536K`; a number without a suffix is mebibytes.
///
/// # Errors
/// Says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write for example 512M or 1G");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let shift = match text[digits..].to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "k" => 10,
        "" | "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Reads seconds, with or without `s`, or minutes with `m`.
///
/// # Errors
/// Says what a duration looks like.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60.0),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let wrong = || format!("{text:?} is not a time: write seconds, for example 30 or 1.5");
    let seconds: f64 = number.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(seconds * unit).map_err(|_| wrong())
}

/// Reads nanoseconds of guest time: a number with `ns`, `us`, `ms` or `s`.
///
/// # Errors
/// Says what such a time looks like.
pub fn parse_latency(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a time: write for example 100us or 2ms");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match &text[digits..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

/// Reads an address: hexadecimal with `0x`, else decimal.
///
/// # Errors
/// Says what an address looks like.
pub fn parse_address(text: &str) -> Result<u64, String> {
    let plain = text.replace('_', "");
    let number = match plain.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => plain.parse(),
    };
    number.map_err(|_| format!("{text:?} is not an address: write for example 0x7c00"))
}

/// Reads `START..END`, either of which may be left out.
///
/// # Errors
/// Says what a range looks like.
pub fn parse_range(text: &str) -> Result<std::ops::Range<u64>, String> {
    let wrong = || format!("{text:?} is not a range: write for example 0x7c00..0x7e00");
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let start = if start.is_empty() { 0 } else { parse_address(start)? };
    let end = if end.is_empty() { u64::MAX } else { parse_address(end)? };
    if start < end { Ok(start..end) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("1G", 1 << 30),
            ("64", 64 << 20),
            ("4096k", 4 << 20),
            ("2GiB", 2 << 30),
            ("3mb", 3 << 20),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "12X", "-1", "1.5G", "99999999999999T", "1Gx"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges() {
        assert_eq!(parse_range("0x7c00..0x7e00"), Ok(0x7c00..0x7e00));
        assert_eq!(parse_range("4096.."), Ok(4096..u64::MAX));
        assert_eq!(parse_range("..0xffff_0000"), Ok(0..0xffff_0000));
        for text in ["", "5", "2..1", "1..1", "a..b", "0x..0xg"] {
            assert!(parse_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn latencies() {
        for (text, ns) in [("0ns", 0), ("100us", 100_000), ("2ms", 2_000_000), ("1s", 1_000_000_000)] {
            assert_eq!(parse_latency(text), Ok(ns), "{text}");
        }
        for text in ["", "5", "us", "1.5ms", "-1s", "1h", "99999999999999s"] {
            assert!(parse_latency(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [("2", 2000), ("1.5", 1500), ("120s", 120_000), ("2m", 120_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "-1", "nan", "1h", "1e400"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
