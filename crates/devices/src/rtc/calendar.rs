//! Time of day and date as the clock's registers hold them.

/// Register B bits that say how numbers are written.
pub const BINARY: u8 = 1 << 2;
/// 24-hour format.
pub const HOURS_24: u8 = 1 << 1;

/// The time registers in the order of their CMOS indices 0, 2, 4, 6, 7, 8, 9, 32h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// 0 to 59.
    Second,
    /// 0 to 59.
    Minute,
    /// 0 to 23, or 1 to 12 with bit 7 for the afternoon.
    Hour,
    /// 1 to 7 from Sunday.
    Weekday,
    /// 1 to 31.
    Day,
    /// 1 to 12.
    Month,
    /// 0 to 99.
    Year,
    /// Always in the format that register B says.
    Century,
}

/// Values of the eight time registers.
pub type Registers = [u8; 8];

/// The field at a CMOS index.
pub fn field_at(index: u8) -> Option<Field> {
    Some(match index {
        0 => Field::Second,
        2 => Field::Minute,
        4 => Field::Hour,
        6 => Field::Weekday,
        7 => Field::Day,
        8 => Field::Month,
        9 => Field::Year,
        0x32 => Field::Century,
        _ => return None,
    })
}

/// A number as the registers hold it.
pub fn encode(value: u8, format: u8) -> u8 {
    if format & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
}

/// The number that a register holds.
pub fn decode(value: u8, format: u8) -> u8 {
    if format & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
}

fn encode_hour(hour: u8, format: u8) -> u8 {
    if format & HOURS_24 != 0 {
        return encode(hour, format);
    }
    let twelve = (hour + 11) % 12 + 1;
    encode(twelve, format) | if hour >= 12 { 0x80 } else { 0 }
}

/// The hour 0 to 23 (or more, if nonsense) that the hour register means.
pub fn decode_hour(value: u8, format: u8) -> u8 {
    if format & HOURS_24 != 0 {
        return decode(value, format);
    }
    let twelve = decode(value & 0x7f, format);
    let hour = if twelve == 12 { 0 } else { twelve };
    hour + if value & 0x80 != 0 { 12 } else { 0 }
}

/// The registers that show `unix` seconds (UTC).
pub fn encode_time(unix: i64, format: u8) -> Registers {
    // Far outside the registers' range, so that a damaged save file's time does no harm.
    let unix = unix.clamp(i64::MIN / 4, i64::MAX / 4);
    let (days, second) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let weekday = (days + 4).rem_euclid(7) + 1;
    [
        encode((second % 60) as u8, format),
        encode((second / 60 % 60) as u8, format),
        encode_hour((second / 3600) as u8, format),
        encode(weekday as u8, format),
        encode(day, format),
        encode(month, format),
        encode(year.rem_euclid(100) as u8, format),
        encode(year.div_euclid(100).rem_euclid(100) as u8, format),
    ]
}

/// The Unix seconds that the registers mean; nonsense in a register is brought into its range.
pub fn decode_time(registers: &Registers, format: u8) -> i64 {
    let number = |field: Field| i64::from(decode(registers[field as usize], format));
    let year = number(Field::Century) * 100 + number(Field::Year);
    let days = days_from_civil(year, number(Field::Month).clamp(1, 12), number(Field::Day).clamp(1, 31));
    let hour = i64::from(decode_hour(registers[Field::Hour as usize], format));
    days * 86_400 + hour.min(23) * 3600 + number(Field::Minute).min(59) * 60 + number(Field::Second).min(59)
}

/// Days since 1970-01-01 in the proleptic Gregorian calendar, counted in eras of 400 years from March.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let year_of_era = y.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, u8, u8) {
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month as u8, day as u8)
}

/// Alarm registers (seconds, minutes, hours); C0h and above match everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alarm {
    second: Option<i64>,
    minute: Option<i64>,
    hour: Option<i64>,
}

impl Alarm {
    /// The alarm that the registers mean.
    pub fn of_registers(second: u8, minute: u8, hour: u8, format: u8) -> Self {
        let number = |raw: u8, value: u8| (raw < 0xc0).then_some(i64::from(value));
        Self {
            second: number(second, decode(second, format)),
            minute: number(minute, decode(minute, format)),
            hour: number(hour, decode_hour(hour, format)),
        }
    }

    /// The first second later than `unix` at which the alarm sounds; `None` if it never does.
    pub fn next_after(&self, unix: i64) -> Option<i64> {
        let beyond = |value: Option<i64>, limit| value.is_some_and(|value| value >= limit);
        if beyond(self.second, 60) || beyond(self.minute, 60) || beyond(self.hour, 24) {
            return None;
        }
        let mut t = unix.checked_add(1).filter(|t| t.checked_add(1 << 20).is_some())?;
        // Each round settles a unit; carrying into the next unit starts at most one more pass.
        for _ in 0..8 {
            if let Some(hour) = self.hour.filter(|&hour| hour != t.div_euclid(3600).rem_euclid(24)) {
                let ahead = (hour - t.div_euclid(3600)).rem_euclid(24);
                t = (t.div_euclid(3600) + ahead) * 3600;
            } else if let Some(minute) = self.minute.filter(|&minute| minute != t.div_euclid(60).rem_euclid(60)) {
                let ahead = (minute - t.div_euclid(60)).rem_euclid(60);
                t = (t.div_euclid(60) + ahead) * 60;
            } else if let Some(second) = self.second.filter(|&second| second != t.rem_euclid(60)) {
                t += (second - t.rem_euclid(60)).rem_euclid(60);
            } else {
                return Some(t);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dates_against_counting_days() {
        let leap = |y: i64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
        let mut days = 0;
        for year in 1970..2405 {
            for (month, length) in
                [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate()
            {
                for day in 1..=length {
                    assert_eq!(civil_from_days(days), (year, month as u8 + 1, day));
                    assert_eq!(days_from_civil(year, month as i64 + 1, day.into()), days);
                    days += 1;
                }
            }
        }
    }

    #[test]
    fn known_times() {
        // 2024-02-29 23:59:58, a Thursday.
        let t = 1_709_251_198;
        assert_eq!(encode_time(t, HOURS_24), [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        assert_eq!(encode_time(t, BINARY | HOURS_24), [58, 59, 23, 5, 29, 2, 24, 20]);
        assert_eq!(encode_time(t, 0)[2], 0x91);
        assert_eq!(encode_time(0, 0), [0, 0, 0x12, 5, 1, 1, 0x70, 0x19]);
    }

    proptest! {
        #[test]
        fn formats_round_trip(unix in -2_000_000_000i64..20_000_000_000, format in 0u8..4) {
            let format = format << 1;
            prop_assert_eq!(decode_time(&encode_time(unix, format), format), unix);
        }

        #[test]
        fn alarm_against_a_search(second in 0u8..70, minute in 0u8..70, hour in 0u8..30, start in 0i64..400_000, wild in 0u8..8) {
            let pick = |bit: u8, value: u8| if wild & bit != 0 { 0xff } else { value };
            let (s, m, h) = (pick(1, second), pick(2, minute), pick(4, hour));
            let hit = |t: i64| (s >= 0xc0 || t % 60 == s.into()) && (m >= 0xc0 || t / 60 % 60 == m.into()) && (h >= 0xc0 || t / 3600 % 24 == h.into());
            let expected = (start + 1..=start + 86_400).find(|&t| hit(t));
            prop_assert_eq!(Alarm::of_registers(s, m, h, BINARY | HOURS_24).next_after(start), expected);
        }
    }
}
